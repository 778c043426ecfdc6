"""An expert as a set of segments (one neuron each), which may go to different experts.

N experts, M of them kept, I segments each, F numbers of a segment: its row of gate and up, its column of down, and
its biases.
"""

import torch
from torch import Tensor

from ..types import ExpertWeights


@torch.no_grad()
def assign_segments(weights: ExpertWeights, kept: Tensor, threshold: float) -> Tensor:
    """Which of the kept experts each segment goes to: the one that has the segment most like it.

    Args:
        weights: All N experts.
        kept: Experts that stay, (M,) int64 ascending.
        threshold: Least cosine at which a segment of another expert goes anywhere.

    Returns:
        (N, I) int64 in [-1, M) on the CPU: -1 for segments that are discarded; those of a kept expert are its own.
        Ties go to the lower expert. Memory: two experts in float32, I^2 numbers and N I values. Time: (N - M) M I^2 F.
    """
    num_experts, width = weights.up.shape[:2]
    device = weights.up.device
    others = [expert for expert in range(num_experts) if expert not in set(kept.tolist())]
    best = torch.full((num_experts, width), -torch.inf, device=device)
    group_of_segment = torch.full((num_experts, width), -1, device=device)
    for group, expert in enumerate(kept.tolist()):
        group_of_segment[expert] = group
        own = units(weights.neurons(expert))
        for other in others:
            alike = (units(weights.neurons(other)) @ own.T).amax(dim=1)
            is_better = (alike > best[other]) & (alike >= threshold)
            best[other] = torch.where(is_better, alike, best[other])
            group_of_segment[other] = torch.where(is_better, group, group_of_segment[other])
    return group_of_segment.cpu()


def transferred_share(group_of_segment: Tensor, num_groups: int) -> Tensor:
    """Share of each expert's segments that went to each kept expert, (N, M) float64 in [0, 1]; 1 for a kept one's own.

    What a router rule takes as "transfer". Rows add up to less than 1 where segments were discarded.

    Args:
        group_of_segment: From `assign_segments`.
        num_groups: M.
    """
    num_experts, width = group_of_segment.shape
    counts = torch.zeros(num_experts, num_groups + 1, dtype=torch.float64)
    place = torch.where(group_of_segment < 0, num_groups, group_of_segment)
    counts.scatter_add_(1, place, torch.ones_like(place, dtype=torch.float64))
    return counts[:, :num_groups] / width


def units(rows: Tensor) -> Tensor:
    """Rows of length 1, (n, F); zeros stay zeros."""
    lengths = rows.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, rows / torch.where(lengths > 0, lengths, 1.0), 0.0)


def spherical_kmeans(rows: Tensor, weight: Tensor, num_clusters: int, iterations: int) -> Tensor:
    """Weighted spherical k-means from the first `num_clusters` rows as centres.

    Args:
        rows: (n, F).
        weight: Of each row in its centre, (n,) >= 0; rows of a cluster whose weights are all 0 count alike.
        num_clusters: At most n.
        iterations: At most so many rounds; it ends when no row changes its cluster.

    Returns:
        Cluster of each row, (n,) int64; ties go to the lower cluster, and a cluster may lose all its rows: its centre
        stays then. Memory: n (F + `num_clusters`) numbers.
    """
    points = units(rows)
    centres = points[:num_clusters]
    cluster = (points @ centres.T).argmax(dim=1)
    for _ in range(iterations):
        shares = shares_in_clusters(cluster, weight, num_clusters)
        sums = torch.zeros_like(centres).index_add_(0, cluster, shares[:, None] * points)
        is_used = torch.zeros(num_clusters, device=rows.device).index_add_(0, cluster, shares) > 0
        centres = torch.where(is_used[:, None], units(sums), centres)
        before, cluster = cluster, (points @ centres.T).argmax(dim=1)
        if torch.equal(before, cluster):
            break
    return cluster


def shares_in_clusters(cluster: Tensor, weight: Tensor, num_clusters: int) -> Tensor:
    """Weights (n,) that add up to 1 within each cluster; equal ones where those of a cluster are all 0."""
    total = weight.new_zeros(num_clusters).index_add_(0, cluster, weight)
    weight = torch.where(total[cluster] > 0, weight, 1.0)
    total = weight.new_zeros(num_clusters).index_add_(0, cluster, weight)
    return weight / total[cluster]
