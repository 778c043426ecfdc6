"""Experts rounded to what a file would hold: the checkpoint's dtype, or 8-bit integers with a scale a row."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

SCALE_BYTES = 4  # a float32 a row
LARGEST = 127  # symmetric: -127..127


def expert_parameters(model: PreTrainedModel, modules: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the experts modules of a model."""
    for name in modules:
        yield from model.get_submodule(name).named_parameters()


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter holds matrices of experts, not biases."""
    return parameter.dim() >= 2 and not name.endswith("bias")


@torch.no_grad()
def round_to_dtype(model: PreTrainedModel, modules: list[str], dtype: torch.dtype) -> int:
    """Round experts in place to values that `dtype` has; gives the bytes that they take in it."""
    size = 0
    for _, parameter in expert_parameters(model, modules):
        parameter.copy_(parameter.to(dtype))
        size += parameter.numel() * dtype.itemsize
    return size


@torch.no_grad()
def round_to_int8(model: PreTrainedModel, modules: list[str], dtype: torch.dtype) -> int:
    """Round the experts' matrices in place to 8 bits, biases not; gives the bytes that all take.

    q = round(w / s) with s = max |w| / 127 of each row of the matrix as it is stored, w' = s q.
    """
    size = 0
    for name, parameter in expert_parameters(model, modules):
        if not is_matrix(name, parameter):
            size += parameter.numel() * dtype.itemsize
            continue
        scale = parameter.float().abs().amax(-1, keepdim=True) / LARGEST
        integers = torch.where(scale > 0, parameter.float() / scale, 0).round()
        parameter.copy_(integers * scale)
        size += parameter.numel() + scale.numel() * SCALE_BYTES
    return size
