"""Clusters of similar experts, joined from the bottom up."""

import torch
from torch import Tensor

from ..grouping import GROUPING
from ..registry import closest
from ..solvers.agglomerative import LINKAGES, cluster_by_distance
from ..types import ExpertGroups


def check_linkage(options: dict) -> None:
    """Raise ValueError for a linkage that there is not."""
    if options["linkage"] not in LINKAGES:
        raise ValueError(
            f"linkage is {options['linkage']!r}, allowed are {LINKAGES}.{closest(options['linkage'], LINKAGES)}"
        )


@GROUPING.register("hierarchical", reads_similarity=True, check=check_linkage)
def group_by_hierarchical_clustering(
    saliency: Tensor, similarity: Tensor, num_groups: int, num_partitions: int = 1, *, linkage: str = "average"
) -> ExpertGroups:
    """Join the closest two clusters of experts until M are left; the member next to the centre leads.

    Grouping of HC-SMoE (Chen et al., 2024, https://arxiv.org/abs/2410.08589), where the similarity is minus the
    distance of mean outputs. In general the distance of two experts is how much less alike they are than an expert
    is to itself; the linkages here do not change with a constant added to all distances.

    The centre of a cluster is the mean of its members' vectors; the member next to it is that of the least sum of
    squared distances to the others. In a cluster of two both are equally far: ties go to the more salient expert,
    then to the lower one.

    Args:
        saliency: (N,); only breaks ties between leaders.
        similarity: Larger is more alike, (N, N) symmetric with a constant diagonal.
        num_groups: M, in 1..N. Exact also under ties.
        num_partitions: Runs of experts that are each clustered alone, to M / P clusters: no member joins another run.
        linkage: "average" (the paper's best), "complete" or "single".

    Raises:
        ValueError: `num_groups` is not in 1..N or not a multiple of `num_partitions`.
    """
    num_experts = saliency.numel()
    check_num_groups(num_groups, num_experts, num_partitions)
    distance = similarity.diagonal().max() - similarity
    of_run = num_groups // num_partitions
    label = torch.empty(num_experts, dtype=torch.int64)
    leaders = []
    for number, run in enumerate(torch.arange(num_experts).chunk(num_partitions)):
        label[run] = cluster_by_distance(distance[run[:, None], run], of_run, linkage) + number * of_run
    for cluster in range(num_groups):
        members = (label == cluster).nonzero().flatten()
        from_others = distance[members[:, None], members].square().sum(dim=1)
        ranked = zip(from_others.tolist(), (-saliency[members]).tolist(), members.tolist(), strict=True)
        leaders.append(min(ranked)[-1])
    return led_groups(label, leaders)


def led_groups(label: Tensor, leaders: list[int]) -> ExpertGroups:
    """Clusters as groups in the order of their leaders.

    Args:
        label: Cluster of each expert, (N,) int64 in [0, M).
        leaders: An expert of each cluster.
    """
    dominant_of_group, cluster_of_group = torch.tensor(leaders).sort()
    return ExpertGroups(cluster_of_group.argsort()[label], dominant_of_group)


def check_num_groups(num_groups: int, num_experts: int, num_partitions: int) -> None:
    """Raise ValueError for a number of groups that N experts in P runs cannot form."""
    if not 1 <= num_groups <= num_experts or num_groups % num_partitions:
        raise ValueError(
            f"num_groups is {num_groups}, it must be in 1..{num_experts} and a multiple of {num_partitions}."
        )
