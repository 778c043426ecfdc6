"""The dendrogram of the experts of a layer, in an order that keeps each group together."""

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform


@dataclass(frozen=True, eq=False)
class ExpertTree:
    """N experts under average linkage."""

    order: np.ndarray  # (N,) int: the expert at each place from left to right
    links: np.ndarray  # (N - 1, 4, 2) float: corners of each link, (place, distance)
    is_within_group: np.ndarray  # (N - 1,) bool: the link joins experts of one group


def expert_tree(similarity: np.ndarray, group_of_expert: np.ndarray) -> ExpertTree:
    """Average linkage of 1 - similarity that joins the experts of a group before it joins groups.

    Where the groups are a cut of the plain tree, as those of hierarchical grouping with average linkage are, this is
    the plain tree. Elsewhere it shows how far apart the members of a group are, and how far the groups: a link within
    a group that is higher than the links above it joined experts that have nearer neighbours in other groups.

    Args:
        similarity: (N, N), symmetric, N at least 2.
        group_of_expert: (N,) int; -1, a dropped expert, is alone.
    """
    num_experts = len(similarity)
    group = np.where(group_of_expert < 0, num_experts + np.arange(num_experts), group_of_expert)
    distance = 1.0 - (similarity + similarity.T).astype(np.float64) / 2
    np.fill_diagonal(distance, 0.0)
    lowest = min(distance.min(), 0.0)  # a similarity above 1 gives a negative distance, which linkage would refuse
    # The average over pairs of different groups does not see what lies within them. So a step that lifts all these
    # pairs above the others delays the joins of groups, changes none of their relations, and is taken off again.
    step = 2.0 * (distance.max() - lowest) + 1.0
    apart = group[:, None] != group[None, :]
    condensed = squareform(np.where(apart, distance - lowest + step, distance - lowest), checks=False)
    condensed = condensed.clip(min=0.0)
    joins = linkage(condensed, method="average")
    order = leaves_list(joins)
    is_within = joins[:, 2] < step
    heights = joins[:, 2] - np.where(is_within, 0.0, step) + lowest
    return ExpertTree(order, _corners(joins, heights, order), is_within)


def _corners(joins: np.ndarray, heights: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The brackets: up from one branch, across, and down to the other."""
    num_experts = len(order)
    place = np.zeros(num_experts + len(joins))
    place[order] = np.arange(num_experts)
    top = np.concatenate([np.zeros(num_experts), heights])
    corners = np.zeros((len(joins), 4, 2))
    for number, (left, right) in enumerate(joins[:, :2].astype(int)):
        place[num_experts + number] = (place[left] + place[right]) / 2
        sides = [(place[left], top[left]), (place[left], heights[number])]
        corners[number] = [*sides, (place[right], heights[number]), (place[right], top[right])]
    return corners
