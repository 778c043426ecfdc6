"""How alike the experts of a layer are, and which of them became one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from ...layer.record import SIMILARITY_OF_EXPERTS
from ...recipe_reading import recipe_from_dict
from ..report_parts import layer_numbers
from .expert_tree import ExpertTree, expert_tree
from .style import BLUE, GREY, INK, MAX_LABELS, SEQUENTIAL, SMALL, VERMILION, WIDTH, legend_above, new_figure

MAX_LAYERS = 6
COLUMNS = 3


def draw_similarity(report: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> Figure | None:
    """Heatmap of the recipe's similarity of each two experts, under their dendrogram, ordered and framed by group.

    Of up to six layers: the first, the last and evenly spaced ones between. All have one colour scale, which ends at
    the least and the largest similarity of two different experts; for the tree see `expert_tree`.

    Args:
        report: See `CompressionReport.to_dict`.
        statistics: See `read_statistics`.

    Returns:
        For each layer drawn a pair of axes, the tree and the map. None if there is no similarity of two experts.
    """
    found = [
        (layer, number, statistics[name].double().numpy())
        for layer, number in zip(report["layers"], layer_numbers(report)[0], strict=True)
        if len(layer["group_of_expert"]) > 1 and (name := f"{layer['layer']}.{SIMILARITY_OF_EXPERTS}") in statistics
    ]
    if not found:
        return None
    chosen = [found[place] for place in evenly_spaced(len(found))]
    columns = min(COLUMNS, len(chosen)) if len(chosen) != 4 else 2
    rows = -(-len(chosen) // columns)
    width = WIDTH if columns > 1 else 0.6 * WIDTH
    figure = new_figure(0.55 + rows * width / columns * 1.2, width)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[1, 3.4] * rows)
    apart = np.concatenate([similarity[~np.eye(len(similarity), dtype=bool)] for _, _, similarity in chosen])
    limits = {"vmin": float(apart.min()), "vmax": float(apart.max())}
    what = layer_numbers(report)[1]
    maps = []
    for place, (layer, number, similarity) in enumerate(chosen):
        row, column = divmod(place, columns)
        groups = np.array(layer["group_of_expert"])
        tree = expert_tree(similarity, groups)
        above = figure.add_subplot(grid[2 * row, column])
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=above)
        draw_tree(above, tree, f"{what} {number}: {layer['num_slots']} → {layer['num_experts_after']}", column == 0)
        draw_map(below, tree, similarity, groups, limits)
        maps.append(below)
    name = str(recipe_from_dict(report["recipe"]).similarity).replace("_", " ")
    bar = figure.colorbar(maps[0].images[0], ax=maps, location="bottom", shrink=0.5, pad=0.02, aspect=40)
    bar.set_label(f"similarity: {name}; white frames: experts that became one", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    legend_above(figure, legend_lines())
    if len(chosen) < len(found):
        figure.text(0.99, 0.985, f"{len(chosen)} of {len(found)} layers", ha="right", va="top", fontsize=SMALL)
    return figure


def evenly_spaced(number: int) -> list[int]:
    """Up to `MAX_LAYERS` places among `number`, first and last included."""
    return sorted({round(place) for place in np.linspace(0, number - 1, min(number, MAX_LAYERS))})


def legend_lines() -> list[Line2D]:
    """What the colours of the links mean."""
    return [
        Line2D([], [], color=VERMILION, lw=1.2, label="joins experts within a group"),
        Line2D([], [], color=GREY, lw=1.2, label="joins groups"),
    ]


def line_width(num_experts: int) -> float:
    """Points: lines must not hide the cells and gaps between them."""
    return float(np.clip(64 / num_experts, 0.3, 1.0))


def draw_tree(axes: Axes, tree: ExpertTree, title: str, has_label: bool) -> None:
    """The dendrogram above a map, with the same places."""
    colours = [VERMILION if within else GREY for within in tree.is_within_group]
    axes.add_collection(LineCollection(list(tree.links), colors=colours, linewidths=line_width(len(tree.order))))
    lowest, highest = min(0.0, tree.links[:, :, 1].min()), tree.links[:, :, 1].max()
    axes.set_ylim(lowest, highest * 1.05 if highest > 0 else 1.0)
    axes.set_title(title, fontsize=SMALL + 1, loc="left", parse_math=False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=SMALL - 1, color=GREY, bottom=False, labelbottom=False)
    if has_label:
        axes.set_ylabel("1 - similarity", fontsize=SMALL)


def draw_map(
    axes: Axes, tree: ExpertTree, similarity: np.ndarray, groups: np.ndarray, limits: Mapping[str, float]
) -> None:
    """The similarities in the order of the tree, with a frame around each group of several."""
    num_experts = len(groups)
    ordered = similarity[np.ix_(tree.order, tree.order)]
    axes.imshow(ordered, cmap=SEQUENTIAL, interpolation="nearest", aspect="auto", **limits)
    for group in np.unique(groups[groups >= 0]):
        places = np.flatnonzero(groups[tree.order] == group)
        if len(places) > 1:
            corner = (places[0] - 0.5, places[0] - 0.5)
            thin = line_width(num_experts)
            axes.add_patch(Rectangle(corner, len(places), len(places), fill=False, edgecolor="white", lw=thin))
    if num_experts <= MAX_LABELS:
        axes.set_xticks(range(num_experts), labels=tree.order, color=INK)
        axes.set_yticks(range(num_experts), labels=tree.order, color=INK)
        for axis, places in ((axes.xaxis, tree.order), (axes.yaxis, tree.order)):
            for tick, expert in zip(axis.get_ticklabels(), places, strict=True):
                tick.set_color(INK if groups[expert] >= 0 else BLUE)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.tick_params(labelsize=SMALL - 1, length=0)
    axes.set_xlabel("expert" if num_experts <= MAX_LABELS else f"{num_experts} experts, by group", fontsize=SMALL)
