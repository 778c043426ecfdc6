"""Implementations of experts whose factors are stacks over experts: one after another, grouped, or slot by slot.

A form that uses them is a `StackedExperts`. Its experts read F numbers and give W for each token, which need not be
the hidden size: a form may do for all experts of a token at once what they share, before and after.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import ExpertForm
from .routed_rows import add_by_expert, run_by_slot, run_sorted, sort_rows

ALIGNMENT = 16  # bytes that rows of the operands of grouped kernels are a multiple of
Project = Callable[[str, Tensor], Tensor]  # (name of a matrix, inputs (S, I)) -> products (S, O) with the bias


class StackedExperts(ExpertForm):
    """What the implementations ask of a form; S rows of tokens."""

    @property
    def output_width(self) -> int:
        """W, what an expert gives for a token before `conclude`."""
        return self.dense_layer.hidden_size

    @property
    def row_bytes(self) -> int:
        """Bytes of the shortest row of a stack, which decides whether grouped kernels can take it."""
        raise NotImplementedError

    def prepare(self, hidden_states: Tensor) -> Tensor:
        """What experts read of tokens (T, D): (T, F)."""
        return hidden_states

    def conclude(self, summed: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        """The output (T, D) from the weighted sum over each token's experts (T, W).

        Args:
            summed: (T, W).
            index: Expert of each slot, (T, k) int64 in [0, M]; M is skipped.
            weights: (T, k).
        """
        return summed

    def run_with(self, project: Project, inputs: Tensor) -> Tensor:
        """What experts give (S, W) for what they read (S, F), with the products of `project`."""
        raise NotImplementedError

    def project(self, matrix: str, expert: int, inputs: Tensor) -> Tensor:
        """Inputs (S, I) times one matrix of one expert, with its bias. (S, O)."""
        raise NotImplementedError

    def grouped_project(self, matrix: str, inputs: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """The same for rows sorted by expert (S,), which end at `ends` (M,) int32; past the end is anything."""
        raise NotImplementedError

    def gathered_project(self, matrix: str, inputs: Tensor, expert: Tensor) -> Tensor:
        """The same for rows that each have an expert (S,) of their own, with a copy of its matrix for each."""
        raise NotImplementedError

    def run_expert(self, expert: int, inputs: Tensor) -> Tensor:
        """What one expert gives (S, W) for inputs (S, F)."""
        return self.run_with(lambda matrix, rows: self.project(matrix, expert, rows), inputs)


def eager(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Expert by expert, each adding to the output in turn."""
    rows = sort_rows(index, weights, module.num_stored)
    summed = add_by_expert(module.run_expert, module.prepare(hidden_states), rows, module.output_width)
    return module.conclude(summed, index, weights)


def grouped(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """All experts on rows sorted by expert, then one sum over each token's choices.

    On the CPU, where grouped kernels are loops too, and for factors that they cannot take (rows that are no multiple
    of 16 bytes), experts run one after another: `sliced`; else `stacked`.
    """
    if hidden_states.device.type == "cpu" or module.row_bytes % ALIGNMENT:
        return sliced(module, hidden_states, index, weights)
    return stacked(module, hidden_states, index, weights)


def sliced(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Expert by expert on slices of sorted rows, after one synchronisation for their sizes."""
    rows = sort_rows(index, weights, module.num_stored)
    summed = run_sorted(module.run_expert, module.prepare(hidden_states), rows, module.output_width)
    return module.conclude(summed, index, weights)


def stacked(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Grouped products with the stacks: the host waits for nothing."""
    num_experts = module.num_stored
    experts, place = index.T.flatten().sort(stable=True)
    bounds = torch.arange(num_experts, device=experts.device)
    ends = torch.searchsorted(experts, bounds, right=True).to(torch.int32)
    # Kernels leave the rows past the last end, those that are skipped, as they find them.
    is_skipped = (experts >= num_experts)[:, None]
    experts = experts.clamp(max=num_experts - 1)

    def project(matrix: str, inputs: Tensor) -> Tensor:
        return module.grouped_project(matrix, inputs, experts, ends).masked_fill(is_skipped, 0)

    inputs = module.prepare(hidden_states)[place % len(index)].masked_fill(is_skipped, 0)
    outputs = module.run_with(project, inputs) * weights.T.flatten()[place, None]
    by_place = torch.empty_like(outputs).index_copy(0, place, outputs)
    summed = by_place.view(-1, len(index), outputs.shape[1]).sum(0).to(hidden_states.dtype)
    return module.conclude(summed, index, weights)


def batched(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each routed slot with its own factors: for few tokens. On the CPU slices of them, without copies."""
    function = sliced if hidden_states.device.type == "cpu" else gathered
    return function(module, hidden_states, index, weights)


def gathered(module: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each routed slot with a copy of its factors."""

    def run_rows(inputs: Tensor, experts: Tensor) -> Tensor:
        return module.run_with(lambda matrix, rows: module.gathered_project(matrix, rows, experts), inputs)

    summed = run_by_slot(run_rows, module.prepare(hidden_states), index, weights, module.num_stored)
    return module.conclude(summed, index, weights)
