"""Means of experts in which every single weight has a weight of its own."""

import torch
from torch import Tensor

from ..types import ExpertWeights


def of_tensors(information: Tensor, experts: ExpertWeights) -> dict[str, Tensor]:
    """What a statistic says of each parameter of experts, by tensor.

    Args:
        information: (m, parameters of an expert), those of `ExpertWeights.tensors()`, flat, one after another.
        experts: The m experts.

    Returns:
        Float32 tensors of the shapes and on the devices of `experts.tensors()`.
    """
    found, start = {}, 0
    for name, tensor in experts.tensors().items():
        size = tensor[0].numel()
        part = information[:, start : start + size]
        found[name] = part.reshape(tensor.shape).to(tensor.device, torch.float32)
        start += size
    return found


def entrywise_mean(tensors: Tensor, information: Tensor, shares: Tensor | None = None) -> Tensor:
    """sum_i F_i * W_i / sum_i F_i, entry by entry; where all F_i are 0, the mean by `shares`.

    Args:
        tensors: W, (m, ...) float32.
        information: F, the same shape and dtype, >= 0.
        shares: (m,) with sum 1; None: the same for all.
    """
    total = information.sum(0)
    weighted = (information * tensors).sum(0) / torch.where(total > 0, total, 1.0)
    if shares is None:
        otherwise = tensors.mean(0)
    else:
        otherwise = torch.einsum("m,m...->...", shares.to(tensors), tensors)
    return torch.where(total > 0, weighted, otherwise)
