"""Implementations of a low rank plus kept rows: y = left (right x) + scatter(S_kept x) for all experts."""

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from .routed_rows import add_by_expert, run_by_slot, run_sorted, sort_rows

ALIGNMENT = 16  # bytes that rows of the operands of grouped kernels are a multiple of


def eager(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Expert by expert, each adding to the output in turn."""
    return add_by_expert(module.run_expert, hidden_states, sort_rows(index, weights, module.num_stored))


def grouped(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """All experts on rows sorted by expert, then one sum over each token's choices.

    On the CPU, where grouped kernels are loops too, and for a rank that they cannot take (rows of a factor that are
    no multiple of 16 bytes), experts run one after another: `sliced`; else `stacked`.
    """
    row_bytes = module.up_right.shape[1] * module.up_right.element_size()
    if hidden_states.device.type == "cpu" or row_bytes % ALIGNMENT:
        return sliced(module, hidden_states, index, weights)
    return stacked(module, hidden_states, index, weights)


def sliced(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Expert by expert on slices of sorted rows, after one synchronisation for their sizes."""
    return run_sorted(module.run_expert, hidden_states, sort_rows(index, weights, module.num_stored))


def stacked(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Grouped products with the stacks of factors, and with the kept rows filled up to the most that an expert has.

    The host waits for nothing. The filled stack of rows is made anew in every call: where experts keep different
    numbers of rows it costs a copy of the largest number for each.
    """
    num_experts = module.num_stored
    experts, place = index.T.flatten().sort(stable=True)
    bounds = torch.arange(num_experts, device=experts.device)
    ends = torch.searchsorted(experts, bounds, right=True).to(torch.int32)
    # Kernels leave the rows past the last end, those that are skipped, as they find them.
    is_skipped = (experts >= num_experts)[:, None]
    experts = experts.clamp(max=num_experts - 1)

    def project(matrix: str, inputs: Tensor) -> Tensor:
        left, right, bias = factors(module, matrix)
        product = _grouped_linear(_grouped_linear(inputs, right, ends), left, ends)
        product = product if bias is None else product + bias[experts]
        rows = filled_rows(module, matrix)
        if rows is not None:
            index_of_row, sparse = rows
            added = _grouped_linear(inputs, sparse, ends)
            product = product.scatter_add(1, index_of_row[experts], added.to(product.dtype))
        return product.masked_fill(is_skipped, 0)

    inputs = hidden_states[place % len(index)].masked_fill(is_skipped, 0)
    outputs = run(module, project, inputs) * weights.T.flatten()[place, None]
    by_place = torch.empty_like(outputs).index_copy(0, place, outputs)
    return by_place.view(-1, *hidden_states.shape).sum(0).to(hidden_states.dtype)


def batched(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each routed slot with its own factors and rows: for few tokens. On the CPU slices of them, without copies."""
    function = sliced if hidden_states.device.type == "cpu" else gathered
    return function(module, hidden_states, index, weights)


def gathered(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each routed slot with a copy of its factors and of its rows, filled up to the most that an expert has."""

    def run_rows(inputs: Tensor, experts: Tensor) -> Tensor:
        def project(matrix: str, inputs: Tensor) -> Tensor:
            left, right, bias = factors(module, matrix)
            product = (left[experts] @ (right[experts] @ inputs[:, :, None]))[:, :, 0]
            product = product if bias is None else product + bias[experts]
            rows = filled_rows(module, matrix)
            if rows is None:
                return product
            index_of_row, sparse = rows
            added = (sparse[experts] @ inputs[:, :, None])[:, :, 0]
            return product.scatter_add(1, index_of_row[experts], added.to(product.dtype))

        return run(module, project, inputs)

    return run_by_slot(run_rows, hidden_states, index, weights, module.num_stored)


def run(module: Any, project: Any, inputs: Tensor) -> Tensor:
    """An expert's function with `project` (matrix name, inputs) -> products."""
    gate = project("gate", inputs) if hasattr(module, "gate_left") else None
    return module.finish(project("down", module.expert_activation(project("up", inputs), gate)))


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
