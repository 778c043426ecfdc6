"""Clusters of experts that are like the same others."""

import torch
from torch import Tensor

from ..grouping import GROUPING
from ..option_checks import check_whole
from ..solvers.kmeans import NUM_STARTS, kmeans
from ..types import ExpertGroups
from .hierarchical import check_num_groups, led_groups

CHECK_STARTS = check_whole("num_starts", 1, f"Leave it out for {NUM_STARTS}.")


@GROUPING.register("kmeans", reads_similarity=True, check=CHECK_STARTS)
def group_by_kmeans(
    saliency: Tensor,
    similarity: Tensor,
    num_groups: int,
    num_partitions: int = 1,
    *,
    seed: int,
    num_starts: int = NUM_STARTS,
) -> ExpertGroups:
    """K-means on the rows of the similarity; the most salient member of a cluster leads.

    Grouping of Sub-MoE (Li et al., 2025, https://arxiv.org/abs/2506.23266), where the similarity is the mean cosine
    of outputs: experts come together that are alike to the same others. Beyond the paper: several starts, and
    clusters are never empty, so the number is exact also where experts are equal.

    Args:
        saliency: (N,); chooses leaders only, ties to the lower expert.
        similarity: Its rows are the points, (N, N).
        num_groups: M, in 1..N.
        num_partitions: Runs of experts that are each clustered alone, to M / P clusters: no member joins another run.
        seed: Of the starts.
        num_starts: Starts of K-means, of which the best counts.

    Raises:
        ValueError: `num_groups` is not in 1..N or not a multiple of `num_partitions`.
    """
    num_experts = saliency.numel()
    check_num_groups(num_groups, num_experts, num_partitions)
    of_run = num_groups // num_partitions
    label = torch.empty(num_experts, dtype=torch.int64)
    for number, run in enumerate(torch.arange(num_experts).chunk(num_partitions)):
        label[run] = kmeans(similarity[run], of_run, seed, num_starts) + number * of_run
    members = [(label == cluster).nonzero().flatten() for cluster in range(num_groups)]
    return led_groups(label, [of_cluster[saliency[of_cluster].argmax()].item() for of_cluster in members])
