"""The importance-weighted mean of a group's members, in which every member has a say."""

import torch
from torch import Tensor

from ..merging import MERGING
from .weighted_average import merge_by_weighted_average

MOST_OF_ZERO = 0.5


@MERGING.register("weighted_average_without_zeros")
def merge_by_weighted_average_without_zeros(members: Tensor, importance: Tensor) -> Tensor:
    """Average the experts of one group, weighted by importance, where 0 counts as the least that is not 0.

    The merging step of REAM (https://arxiv.org/abs/2604.04356), after its public code: an importance of 0 is
    replaced by the smallest one of the group that is not, but at most by 0.5.

    Args:
        members: (m, O, I) float32, aligned; row 0 is the dominant expert.
        importance: Not necessarily normalised, (m,), >= 0.

    Returns:
        The merged matrix, (O, I) float32. If all importances are zero, the plain mean.
    """
    least = importance.masked_fill(importance <= 0, MOST_OF_ZERO).min()
    return merge_by_weighted_average(members, torch.where(importance > 0, importance, least))
