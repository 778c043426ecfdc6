"""The importance-weighted mean of a group's members."""

import torch
from torch import Tensor

from ..merging import MERGING


@MERGING.register("weighted_average")
def merge_by_weighted_average(members: Tensor, importance: Tensor) -> Tensor:
    """Average the experts of one group, weighted by importance.

    The merging step of M-SMoE (Li et al., 2024, section 3.2, https://arxiv.org/abs/2310.01334) with usage
    frequency as importance: rarely used experts cannot drown the dominant one.

    Args:
        members: One weight matrix of every expert in the group, neurons already aligned to the dominant
            expert's order, (m, O, I) float32; row 0 is the dominant expert.
        importance: Not necessarily normalised, (m,), >= 0.

    Returns:
        The merged matrix, (O, I) float32. If all importances are zero (calibration never reached the
        group) the dominant expert unchanged; the public code makes such an expert all zero.
    """
    total = importance.sum()
    if total == 0:
        return members[0]
    coefficients = (importance / total).to(members.device, torch.float32)
    return torch.einsum("m,mon->on", coefficients, members)
