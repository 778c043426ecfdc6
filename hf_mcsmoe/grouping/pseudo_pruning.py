"""A few large groups around the most salient experts; the other leaders stay as they are, as in pruning."""

import torch
from torch import Tensor

from ..grouping import GROUPING
from ..option_checks import check_whole
from ..types import ExpertGroups
from .dominant_experts import choose_dominant, group_around_dominant_experts

CHECK_SIZE = check_whole("group_size", 0, "0 gives each expert to the most similar leader.")


def check_capacity(num_experts: int, num_groups: int, options: dict) -> None:
    """Raise ValueError where M groups of at most `group_size` cannot hold all N experts."""
    size = options["group_size"]
    if size and num_groups * size < num_experts:
        raise ValueError(
            f"group_size is {size}, but {num_groups} groups of {size} cannot hold {num_experts} experts. "
            f"Use at least {-(-num_experts // num_groups)}, or 0 for groups of any size."
        )


@GROUPING.register("pseudo_pruning", reads_similarity=True, check=CHECK_SIZE, check_sizes=check_capacity)
def group_by_pseudo_pruning(
    saliency: Tensor, similarity: Tensor, num_groups: int, num_partitions: int = 1, *, group_size: int = 16
) -> ExpertGroups:
    """The M most salient experts lead; from the most salient one on, each takes the most similar ones that are free.

    Grouping of REAM (https://arxiv.org/abs/2604.04356), after its public code: a leader takes up to
    `group_size` - 1 experts, and when all are taken the leaders that are left stay alone, untouched. Ties go to the
    lower expert.

    Args:
        saliency: (N,).
        similarity: Larger is more alike, (N, N) symmetric; the diagonal is not used.
        num_groups: M, in 1..N.
        num_partitions: Runs of experts that each contribute M / P leaders, see `choose_dominant`. A member may join a
            leader of another run.
        group_size: Most experts of a group, its leader counted; 16 in the paper, 32 for models with many experts. 0
            gives each expert to the most similar leader, whatever the size.

    Raises:
        ValueError: `num_groups` is not in 1..N or not a multiple of `num_partitions`, or the groups cannot hold all.
    """
    check_capacity(saliency.numel(), num_groups, {"group_size": group_size})
    if group_size == 0:
        return group_around_dominant_experts(saliency, similarity, num_groups, num_partitions)
    dominant_of_group = choose_dominant(saliency, num_groups, num_partitions)
    group_of_expert = torch.full((saliency.numel(),), -1)
    group_of_expert[dominant_of_group] = torch.arange(num_groups)
    for group in saliency[dominant_of_group].argsort(descending=True, stable=True).tolist():
        free = (group_of_expert == -1).nonzero().flatten()
        alike = similarity[dominant_of_group[group], free].argsort(descending=True, stable=True)
        group_of_expert[free[alike[: group_size - 1]]] = group
    return ExpertGroups(group_of_expert, dominant_of_group)
