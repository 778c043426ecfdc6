"""The most salient experts lead; every other expert joins the most similar leader."""

import torch
from torch import Tensor

from ..grouping import GROUPING
from ..types import ExpertGroups


def choose_dominant(saliency: Tensor, num_groups: int, num_partitions: int = 1) -> Tensor:
    """The `num_groups` most salient experts, (M,) int64 ascending; ties go to the lower expert.

    With `num_partitions` > 1 (group-limited routers) the experts are P runs of N / P and each run
    contributes M / P leaders.

    Raises:
        ValueError: `num_groups` is not in 1..N or not a multiple of `num_partitions`.
    """
    num_experts = saliency.numel()
    if not 1 <= num_groups <= num_experts or num_groups % num_partitions:
        raise ValueError(
            f"num_groups is {num_groups}, it must be in 1..{num_experts} and a multiple of {num_partitions}."
        )
    runs = saliency.view(num_partitions, -1)
    order = runs.argsort(dim=1, descending=True, stable=True)[:, : num_groups // num_partitions]
    first_of_run = torch.arange(num_partitions)[:, None] * runs.shape[1]
    return (order + first_of_run).flatten().sort().values


@GROUPING.register("dominant_experts", reads_similarity=True)
def group_around_dominant_experts(
    saliency: Tensor, similarity: Tensor, num_groups: int, num_partitions: int = 1
) -> ExpertGroups:
    """Make the M most salient experts dominant and give every other expert to the most similar one.

    Grouping of M-SMoE (Li et al., 2024, section 3.2, https://arxiv.org/abs/2310.01334), where `saliency` is
    the usage frequency and `similarity` that of the router logits. The public code's uniform variant
    confuses usage rank with expert id; this one does not. Ties go to the lower expert and group.

    Args:
        saliency: (N,).
        similarity: Larger is more alike, (N, N) symmetric; the diagonal is not used.
        num_groups: M, in 1..N.
        num_partitions: Runs of experts that each contribute M / P leaders, see `choose_dominant`. A member
            may join a leader of another run.
    """
    dominant_of_group = choose_dominant(saliency, num_groups, num_partitions)
    group_of_expert = similarity[:, dominant_of_group].argmax(dim=1)
    group_of_expert[dominant_of_group] = torch.arange(num_groups)
    return ExpertGroups(group_of_expert, dominant_of_group)
