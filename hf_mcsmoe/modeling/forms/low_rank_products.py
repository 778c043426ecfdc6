"""Products with a low rank plus kept rows of many experts at once: y = left (right x) + scatter(S_kept x)."""

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from .stack_products import ALIGNMENT


def grouped_product(module: Any, matrix: str, inputs: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    """Products of sorted rows with the factors, and with the kept rows filled up to the most that an expert has.

    The filled stack of rows is made anew in every call: where experts keep different numbers of rows it costs a copy
    of the largest number for each.
    """
    left, right, bias = factors(module, matrix)
    product = _grouped_linear(_grouped_linear(inputs, right, ends), left, ends)
    product = product if bias is None else product + bias[experts]
    rows = filled_rows(module, matrix)
    if rows is None:
        return product
    index_of_row, sparse = rows
    added = _grouped_linear(inputs, sparse, ends)
    return product.scatter_add(1, index_of_row[experts], added.to(product.dtype))


def gathered_product(module: Any, matrix: str, inputs: Tensor, experts: Tensor) -> Tensor:
    """Products of rows that each have a copy of their factors, and of kept rows filled up like that."""
    left, right, bias = factors(module, matrix)
    product = (left[experts] @ (right[experts] @ inputs[:, :, None]))[:, :, 0]
    product = product if bias is None else product + bias[experts]
    rows = filled_rows(module, matrix)
    if rows is None:
        return product
    index_of_row, sparse = rows
    added = (sparse[experts] @ inputs[:, :, None])[:, :, 0]
    return product.scatter_add(1, index_of_row[experts], added.to(product.dtype))


def factors(module: Any, matrix: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """`left` (M, O, r), `right` (M, r, I) and the bias (M, O) or None of one matrix."""
    left, right = getattr(module, f"{matrix}_left"), getattr(module, f"{matrix}_right")
    return left, right, getattr(module, f"{matrix}_bias", None)


def filled_rows(module: Any, matrix: str) -> tuple[Tensor, Tensor] | None:
    """The kept rows of one matrix as a stack over experts, filled up with zeros.

    Returns:
        Row of the expert's matrix (M, W), 0 where filled, and values (M, W, I); W is the most that an expert keeps,
        rounded up to what grouped kernels take. None without any rows.
    """
    sparse, rows = getattr(module, f"{matrix}_sparse"), getattr(module, f"{matrix}_rows")
    if len(sparse) == 0:
        return None
    on_host = module.host_integers(f"{matrix}_row_offsets")
    most = max(end - start for start, end in itertools.pairwise(on_host))
    step = max(1, ALIGNMENT // sparse.element_size())
    width = -(-most // step) * step
    if len(sparse) == width * module.num_stored:
        return rows.view(-1, width), sparse.view(-1, width, sparse.shape[1])
    offsets = getattr(module, f"{matrix}_row_offsets")
    place = offsets[:-1, None] + torch.arange(width, device=offsets.device)
    is_filled = place >= offsets[1:, None]
    place = place.clamp(max=len(sparse) - 1)
    return rows[place].masked_fill(is_filled, 0), sparse[place].masked_fill(is_filled[:, :, None], 0)
