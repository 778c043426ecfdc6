"""What each layer kept, and what that cost."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..report_parts import layer_numbers, neurons_of_layers
from .style import BLUE, LIGHT_GREY, SMALL, VERMILION, legend_above, new_figure, number_ticks, tidy

LOG_FROM = 30.0  # errors whose extremes differ by this factor are drawn on a logarithmic axis
ERROR = "output error\n|new - old|² / |old|²"


def draw_layers(report: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Figure | None:  # noqa: ARG001
    """Experts, neurons where experts were narrowed, and the output error of each layer.

    Args:
        report: See `CompressionReport.to_dict`.
        statistics: Not used: all is in the report.

    Returns:
        One axes a quantity, from the top: experts, neurons if a width changed, error; None without layers.
    """
    layers = report["layers"]
    if not layers:
        return None
    labels, what = layer_numbers(report)
    places = np.arange(len(layers))
    neurons = neurons_of_layers(layers)
    panels = 3 if neurons is not None else 2
    figure = new_figure(height=0.4 + 1.75 * panels)
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    before, after = ([layer[f"num_experts_{time}"] for layer in layers] for time in ("before", "after"))
    draw_bars(axes[0], places, before, after, "experts")
    if neurons is not None:
        draw_bars(axes[1], places, *neurons, "neurons\nof all experts")
    draw_errors(axes[-1], places, layers)
    tidy(axes[-1], x=what)
    number_ticks(axes[-1].xaxis, labels)
    axes[-1].set_xlim(-0.6, len(layers) - 0.4)
    legend_above(figure, *axes[0].get_legend_handles_labels())
    return figure


def draw_bars(axes: Axes, places: np.ndarray, before: list[int], after: list[int], what: str) -> None:
    """What was kept, in front of what there was; few layers get their numbers."""
    axes.bar(places, before, width=0.8, color=LIGHT_GREY, label="original")
    bars = axes.bar(places, after, width=0.8, color=BLUE, label="kept")
    if len(places) <= 12:
        axes.bar_label(bars, [f"{number:,}" for number in after], fontsize=SMALL, padding=1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    tidy(axes, y=what)


def draw_errors(axes: Axes, places: np.ndarray, layers: list[Mapping[str, Any]]) -> None:
    """The error with all that was done, and where a refit was tried that without it."""
    errors = values_of(layers, "relative_error")
    unfitted = values_of(layers, "refit_error_before")
    known = np.concatenate([errors, unfitted])
    known = known[np.isfinite(known) & (known > 0)]
    if np.isfinite(unfitted).any():
        axes.plot(places, unfitted, ls="", marker="o", ms=4, mfc="white", mec=VERMILION, label="before the refit")
    axes.plot(places, errors, ls="", marker="o", ms=4, color=VERMILION, label="of the result")
    if known.size and known.max() > LOG_FROM * known.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0, top=known.max() * 1.15 if known.size else 1.0)
    axes.grid(axis="y", color=LIGHT_GREY, lw=0.6)
    axes.set_axisbelow(True)
    if np.isfinite(unfitted).any():
        axes.legend(fontsize=SMALL, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.95))
    if not np.isfinite(errors).any():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", fontsize=SMALL)
    tidy(axes, y=ERROR)


def values_of(layers: list[Mapping[str, Any]], name: str) -> np.ndarray:
    """A field of every layer, NaN where there is none."""
    return np.array([np.nan if layer.get(name) is None else layer[name] for layer in layers], dtype=float)
