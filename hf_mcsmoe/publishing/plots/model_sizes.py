"""How large the model was and is."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ..report_parts import parts_of_size
from .style import BLUE, GREY, SMALL, legend_above, new_figure, tidy

UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3))


def draw_sizes(report: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Figure:  # noqa: ARG001
    """Bytes before and after as bars: the experts of the compressed layers, and the rest of the model.

    Args:
        report: See `CompressionReport.to_dict`.
        statistics: Not used: all is in the report.

    Returns:
        Its axes have four rectangles: the experts before and after, then the rest before and after.
    """
    experts, rest = parts_of_size(report)
    totals = (report["total_bytes_before"], report["total_bytes_after"])
    unit, factor = next(((unit, factor) for unit, factor in UNITS if max(totals) >= factor), ("bytes", 1))
    figure = new_figure(height=1.75)
    axes = figure.add_subplot()
    rows = ["original", "compressed"]
    axes.barh(rows, [size / factor for size in experts], color=BLUE, height=0.6, label="experts of compressed layers")
    others = axes.barh(
        rows, [s / factor for s in rest], left=[s / factor for s in experts], color=GREY, height=0.6, label="the rest"
    )
    texts = [f"{totals[0] / factor:.3g} {unit}", f"{totals[1] / factor:.3g} {unit} ({totals[1] / totals[0]:.1%})"]
    axes.bar_label(others, texts, fontsize=SMALL, padding=4)
    axes.set_xlim(0, max(totals) / factor * 1.22)
    axes.invert_yaxis()
    tidy(axes, x=f"size of the parameters ({unit})")
    legend_above(figure, *axes.get_legend_handles_labels())
    return figure
