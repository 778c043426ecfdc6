"""The recipes that the preset "auto" tried."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ...types import Trial
from .style import BLUE, LIGHT_GREY, SMALL, new_figure, tidy


def draw_trials(report: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Figure | None:  # noqa: ARG001
    """KL to the original of every recipe that was tried, the best on top; the chosen one is blue.

    Args:
        report: See `CompressionReport.to_dict`.
        statistics: Not used: all is in the report.

    Returns:
        One axes with a bar for each recipe; None if none was tried.
    """
    trials = [Trial(**trial) for trial in report.get("tried") or [] if trial["kl"] is not None]
    if not trials:
        return None
    trials.sort(key=lambda trial: trial.kl)
    figure = new_figure(height=0.8 + 0.34 * len(trials))
    axes = figure.add_subplot()
    colours = [BLUE if trial.is_chosen else LIGHT_GREY for trial in trials]
    bars = axes.barh(range(len(trials)), [trial.kl for trial in trials], color=colours, height=0.7)
    axes.bar_label(bars, [f"{t.kl:.4f}{' chosen' if t.is_chosen else ''}" for t in trials], fontsize=SMALL, padding=4)
    axes.set_yticks(range(len(trials)), labels=[trial.label for trial in trials], parse_math=False)
    axes.set_xlim(0, max(trial.kl for trial in trials) * 1.2 or 1.0)
    axes.invert_yaxis()
    tidy(axes, x="KL(original || compressed), nats per held-out calibration token")
    return figure
