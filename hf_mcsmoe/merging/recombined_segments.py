"""Segments of dropped experts go to the kept experts that they are most like, and are clustered there."""

from typing import Any

import torch
from torch import Tensor

from ..merging import MERGING
from ..option_checks import check_real, check_whole
from ..solvers.segments import assign_segments, shares_in_clusters, spherical_kmeans, transferred_share
from ..types import ExpertGroups, ExpertWeights

THRESHOLD = 0.3


def check_segments(options: dict[str, Any]) -> None:
    """Raise ValueError for a threshold that is no cosine, or a number of rounds below 1."""
    check_real("threshold", -1, 1, "1 discards all segments but copies.")(options)
    check_whole("iterations", 1, "Leave it out for 10.")(options)


def share_of_segments(weights: ExpertWeights, groups: ExpertGroups, options: dict[str, Any]) -> Tensor:
    """Share of each expert's segments that went to each leader, (N, M) float64, for router rules."""
    group_of_segment = assign_segments(weights, groups.dominant_of_group, options["threshold"])
    return transferred_share(group_of_segment, groups.num_groups)


@MERGING.register("recombined_segments", takes="layer", check=check_segments, transfer=share_of_segments)
def merge_by_recombining_segments(
    weights: ExpertWeights,
    groups: ExpertGroups,
    importance: Tensor,
    *,
    threshold: float = THRESHOLD,
    iterations: int = 10,
) -> ExpertWeights:
    """Cluster the segments that an expert has and those that it gets back to its width.

    DERN (Zhou et al., 2025, https://arxiv.org/abs/2509.10377), after a third party's implementation, as the paper's
    equations were not at hand. A segment is one neuron: its rows of gate and up and its column of down. Each segment
    of an expert that does not lead goes to the leader with the segment of largest cosine, or nowhere below
    `threshold`; so segments of one expert may go to several. Then weighted spherical k-means from a leader's own
    segments, weights being the importance of the expert a segment comes from, and each cluster becomes one segment.
    A mean of vectors that do not point the same way is short: each part of a centre (gate, up, down, with biases) gets
    the mean length of that part in the cluster, which is our reading of the method's "norm equalisation". Our choices
    too: the threshold, the initial centres, and that the groups of members, if any, do not matter. The router rows of
    the method need the trait `transfer`, `share_of_segments`.

    Memory: two experts in float32 and N I values for the assignment, 4 (I + r) (F + I) bytes for an expert that gets
    r segments of F numbers. Time: (N - M) M I^2 F for the assignment.

    Args:
        weights: All N experts.
        groups: Leaders are kept, all others are dropped, also members of groups.
        importance: (N,), >= 0.
        threshold: Cosine in [-1, 1].
        iterations: Rounds of k-means at most.

    Returns:
        M experts, float32: one that got nothing, and a segment that is alone in its cluster, as they are.
    """
    group_of_segment = assign_segments(weights, groups.dominant_of_group, threshold)
    kept = groups.dominant_of_group.to(weights.up.device)
    result = {name: tensor[kept].float() for name, tensor in weights.tensors().items()}
    for group, dominant in enumerate(groups.dominant_of_group.tolist()):
        experts, segments = (group_of_segment == group).nonzero().unbind(dim=1)
        is_own = experts == dominant
        experts, segments = (torch.cat([index[is_own], index[~is_own]]) for index in (experts, segments))
        if len(experts) == weights.width:
            continue
        found = gather_segments(weights, experts, segments)
        weight = importance[experts].to(weights.up.device, torch.float32)
        rows = torch.cat([part for part in found.values()], dim=1)
        cluster = spherical_kmeans(rows, weight, weights.width, iterations)
        for name, tensor in centres_of(found, cluster, weight, weights.width).items():
            result[name][group] = tensor
    return ExpertWeights(**result)


def gather_segments(weights: ExpertWeights, experts: Tensor, segments: Tensor) -> dict[str, Tensor]:
    """The parts of some segments, "gate", "up" and "down", (n, D) or (n, D + 1) with a bias, float32."""
    experts, segments = experts.to(weights.up.device), segments.to(weights.up.device)
    found = {}
    for name in ("gate", "up", "down"):
        matrix = getattr(weights, name)
        if matrix is None:
            continue
        rows = (matrix[experts, :, segments] if name == "down" else matrix[experts, segments]).float()
        bias = getattr(weights, f"{name}_bias") if name != "down" else None
        found[name] = rows if bias is None else torch.cat([rows, bias[experts, segments, None].float()], dim=1)
    return found


def centres_of(parts: dict[str, Tensor], cluster: Tensor, weight: Tensor, width: int) -> dict[str, Tensor]:
    """One segment for each cluster, as the matrices and biases of one expert.

    A cluster that lost all its segments takes none: zeros, which add nothing.
    """
    shares = shares_in_clusters(cluster, weight, width)
    is_alone = cluster.bincount(minlength=width)[cluster] == 1
    centres: dict[str, Tensor] = {}
    for name, rows in parts.items():
        mean = rows.new_zeros(width, rows.shape[1]).index_add_(0, cluster, shares[:, None] * rows)
        length = rows.new_zeros(width).index_add_(0, cluster, shares * rows.norm(dim=1))
        norm = mean.norm(dim=1)
        centre = mean * torch.where(norm > 0, length / torch.where(norm > 0, norm, 1.0), 0.0)[:, None]
        centre[cluster[is_alone]] = rows[is_alone]
        hidden = centre.shape[1]
        if name != "down" and parts["down"].shape[1] < hidden:
            centres[f"{name}_bias"], centre = centre[:, -1], centre[:, :-1]
        centres[name] = centre.T if name == "down" else centre
    return centres
