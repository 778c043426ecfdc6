"""What all figures share: sizes, colours that colour-blind people tell apart, axes without clutter."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 8.0  # inches
DPI = 120
# Okabe and Ito, https://jfly.uni-koeln.de/color/
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY, LIGHT_GREY, INK = "#707070", "#D9D9D9", "#222222"
SEQUENTIAL = "cividis"  # monotonic in lightness, and the same to most colour-blind people
MAX_LABELS = 16  # more experts or layers than that are not labelled one by one
LABEL_SIZE, SMALL = 9, 8


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, *, x: str | None = None, y: str | None = None, title: str | None = None) -> None:
    """Labels, and lines only where numbers are read off."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    label(axes, x=x, y=y, title=title)


def label(axes: Axes, *, x: str | None = None, y: str | None = None, title: str | None = None) -> None:
    """Labels of both axes, and a title; dollar signs are dollar signs."""
    if x is not None:
        axes.set_xlabel(x, fontsize=LABEL_SIZE, parse_math=False)
    if y is not None:
        axes.set_ylabel(y, fontsize=LABEL_SIZE, parse_math=False)
    if title is not None:
        axes.set_title(title, fontsize=LABEL_SIZE + 1, loc="left", parse_math=False)
    axes.tick_params(labelsize=SMALL, color=GREY)


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str] | None = None) -> None:
    """A legend over the plots, so that it hides none of them."""
    labels = [handle.get_label() for handle in handles] if labels is None else labels
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=SMALL)


def number_ticks(axis: Any, positions: Sequence[Any]) -> None:
    """Ticks of an axis of whole numbers 0, 1, ...: all of them if they are few, else round ones."""
    if len(positions) <= MAX_LABELS:
        axis.set_ticks(range(len(positions)), labels=[str(position) for position in positions])
    else:
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 4, 5, 10]))
