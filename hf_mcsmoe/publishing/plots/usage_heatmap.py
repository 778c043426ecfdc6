"""How often the router chose each expert of each layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from ..report_parts import layer_numbers
from .style import INK, LIGHT_GREY, MAX_LABELS, SEQUENTIAL, SMALL, VERMILION, label, new_figure, number_ticks

SHOWN_PERCENTILE = 99  # brighter cells are all of the brightest colour, or one outlier would leave the others dark


def draw_usage(report: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Figure | None:  # noqa: ARG001
    """Heatmap layer x expert of the share of a layer's selections, in units of an equal share.

    1 is what each expert gets from a router that is perfectly balanced, so that layers with different numbers of
    experts compare. Experts that no calibration token chose are grey.

    Args:
        report: See `CompressionReport.to_dict`.
        statistics: Not used: the shares are in the report.

    Returns:
        Its first image holds the numbers, (layers, most experts), NaN where there is no expert; None without layers.
    """
    layers = report["layers"]
    if not layers:
        return None
    shares = relative_usage(layers)
    num_layers, num_experts = shares.shape
    is_small = num_experts <= MAX_LABELS and num_layers <= MAX_LABELS
    figure = new_figure(height=min(9.0, max(2.3, 1.3 + num_layers * (0.32 if is_small else 0.14))))
    axes = figure.add_subplot()
    used = shares[shares > 0]
    top = max(1.0, float(np.percentile(used, SHOWN_PERCENTILE))) if used.size else 1.0
    colours = colormaps[SEQUENTIAL].with_extremes(under=LIGHT_GREY, bad="white")
    # Just above zero, so that an expert that was never chosen is below the scale.
    image = axes.imshow(shares, aspect="auto", cmap=colours, vmin=1e-9, vmax=top, interpolation="nearest")
    if is_small:
        write_values(axes, shares, top)
    labels, what = layer_numbers(report)
    number_ticks(axes.xaxis, range(num_experts))
    number_ticks(axes.yaxis, labels)
    unused = int((shares == 0).sum())
    title = f"Usage of {int(np.isfinite(shares).sum()):,} experts on calibration tokens"
    label(axes, x="expert", y=what, title=title)
    if unused:
        note = f"{unused:,} never chosen (grey)"
        axes.set_title(note, fontsize=SMALL, loc="right", color=VERMILION if unused > num_layers else INK)
    extend = "max" if used.size and used.max() > top else "neither"
    bar = figure.colorbar(image, ax=axes, extend=extend, pad=0.015, aspect=40)
    bar.set_label("selections, 1 = equal share", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def relative_usage(layers: list[Mapping[str, Any]]) -> np.ndarray:
    """Share of each expert times the number of experts, (layers, most experts); NaN where there is no expert."""
    shares = np.full((len(layers), max(len(layer["usage_frequency"]) for layer in layers)), np.nan)
    for row, layer in zip(shares, layers, strict=True):
        number = len(layer["usage_frequency"])
        row[:number] = np.array(layer["usage_frequency"], dtype=float) * number
    return shares


def write_values(axes: Any, values: np.ndarray, top: float) -> None:
    """Each number into its cell, dark on bright and bright on dark."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = INK if value > 0.55 * top or value == 0 else "white"
            text = f"{value:.2f}" if value > 0 else "0"
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=colour)
