"""Layers keep what makes the sum of their measured errors least."""

import torch
from torch import Tensor

from ..allocation import ALLOCATION
from ..types import LayerStatistics
from .limits import check_limits, limits


@ALLOCATION.register("error_curve", needs=("chosen_gram",), check_budget=check_limits)
def allocate_by_error_curve(
    saliency_of_layer: list[Tensor],
    budget_of_layer: list[int],
    *,
    statistics_of_layer: list[LayerStatistics],
    min_experts: int = 1,
    max_experts: int | None = None,
) -> list[int]:
    """Minimise the sum over layers of E_l(M_l), the relative squared error of layer l with its M_l best experts alone.

    E_l is measured, not modelled: the recipe's saliency orders the experts, and the error of dropping the least
    salient ones follows from `chosen_gram`, with the weights of the others as they are (the mapped layout). It is
    relative to the energy of the layer's routed output. For a recipe that merges instead of dropping it stands for the
    error before the merge. Ours. The curves need not be convex, so no greedy rule is best: the minimum is found by
    dynamic programming over layers and totals, in L * N * sum(budget) steps. Ties: a later layer keeps as few as it
    may.

    Args:
        saliency_of_layer: One (N,) tensor per layer, of any scale; ties keep the lower expert.
        budget_of_layer: How many experts each layer would keep on average; only their sum counts.
        statistics_of_layer: With `chosen_gram`.
        min_experts: Least number of experts a layer keeps.
        max_experts: Largest number of experts a layer keeps; None for no limit.

    Returns:
        Experts per layer; they add up to `sum(budget_of_layer)`.

    Raises:
        ValueError: The limits leave no way to spend the budget exactly.
    """
    sizes, total = [saliency.numel() for saliency in saliency_of_layer], sum(budget_of_layer)
    most = limits(sizes, total, min_experts, max_experts)
    if total == sum(sizes):
        return sizes  # nothing to measure; streaming has no statistics then
    best = torch.full((total + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    choices = []
    for saliency, statistics, limit in zip(saliency_of_layer, statistics_of_layer, most, strict=True):
        curve = error_of_keeping(statistics["chosen_gram"], saliency).tolist()
        counts = range(min_experts, limit + 1)
        ways = torch.full((len(counts), total + 1), torch.inf, dtype=torch.float64)
        for row, count in enumerate(counts[: total + 1 - min_experts]):
            ways[row, count:] = best[: total + 1 - count] + curve[count]
        best, row_of_total = ways.min(dim=0)
        choices.append(row_of_total + min_experts)
    allotted = []
    for row_of_total in reversed(choices):
        allotted.append(int(row_of_total[total - sum(allotted)]))
    return allotted[::-1]


def error_of_keeping(gram: Tensor, saliency: Tensor) -> Tensor:
    """Relative squared error of a layer that keeps its 0, 1, ..., N most salient experts, (N + 1,) float64.

    Args:
        gram: `chosen_gram`, (N, N).
        saliency: (N,).
    """
    order = saliency.argsort(descending=True, stable=True).flip(0)  # the first one goes first
    dropped = gram[order][:, order].cumsum(0).cumsum(1).diagonal()  # of the first 1, ..., N
    energy = gram.sum()
    errors = torch.cat([dropped.flip(0), dropped.new_zeros(1)])
    return errors.clamp(min=0) / energy if energy > 0 else torch.zeros_like(errors)
