"""The most salient experts stay, the others are dropped."""

import torch
from torch import Tensor

from ..grouping import GROUPING
from ..types import ExpertGroups
from .dominant_experts import choose_dominant


@GROUPING.register("drop", drops=True)
def drop_the_least_salient(
    saliency: Tensor,
    similarity: Tensor | None,
    num_groups: int,
    num_partitions: int = 1,
) -> ExpertGroups:
    """Expert pruning: M groups of one expert each; the others are in group -1.

    Args:
        saliency: (N,).
        similarity: Not used.
        num_groups: M, in 1..N.
        num_partitions: Runs of experts that each keep M / P, see `choose_dominant`.
    """
    dominant_of_group = choose_dominant(saliency, num_groups, num_partitions)
    group_of_expert = torch.full((saliency.numel(),), -1)
    group_of_expert[dominant_of_group] = torch.arange(num_groups)
    return ExpertGroups(group_of_expert, dominant_of_group)
