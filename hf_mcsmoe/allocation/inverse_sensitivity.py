"""Layers lose experts in inverse proportion to what leaving one out does to their output."""

import heapq

from torch import Tensor

from ..allocation import ALLOCATION
from ..types import LayerStatistics
from .limits import check_limits, limits


@ALLOCATION.register("inverse_sensitivity", needs=("chosen_gram",), check_budget=check_limits)
def allocate_by_inverse_sensitivity(
    saliency_of_layer: list[Tensor],
    budget_of_layer: list[int],
    *,
    statistics_of_layer: list[LayerStatistics],
    min_experts: int = 1,
    max_experts: int | None = None,
) -> list[int]:
    """Drop experts of layer l in proportion to 1 / I_l, I_l = sum over its experts e of |F(X) - F without e (X)|_F.

    The first stage of MoE-I2 (Yang et al., 2024, https://arxiv.org/abs/2411.01016), which we know second-hand only.
    Leaving out e changes the output by g f_e where the router chose it, with the weights of the token's other experts
    as they are, not renormalised: what the mapped layout does. So one routed pass gives all terms. Seats are
    dealt out by Webster's method: the next expert goes from the layer of least I_l (2 p_l + 1), p_l being gone
    already, ties to the layer that lost fewer, then to the lower one. So the total is exact, and any limit is kept.

    Args:
        saliency_of_layer: Only their sizes (N,) are read.
        budget_of_layer: How many experts each layer would keep on average; only their sum counts.
        statistics_of_layer: With `chosen_gram`.
        min_experts: Least number of experts a layer keeps; the paper keeps top-k.
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
    sensitivity = [statistics["chosen_gram"].diagonal().sqrt().sum().item() for statistics in statistics_of_layer]
    gone = [size - limit for size, limit in zip(sizes, most, strict=True)]
    waiting = [(sensitivity[layer] * (2 * gone[layer] + 1), gone[layer], layer) for layer in range(len(sizes))]
    heapq.heapify(waiting)
    for _ in range(sum(sizes) - total - sum(gone)):
        while True:
            _, _, layer = heapq.heappop(waiting)
            if sizes[layer] - gone[layer] > min_experts:
                break
        gone[layer] += 1
        heapq.heappush(waiting, (sensitivity[layer] * (2 * gone[layer] + 1), gone[layer], layer))
    return [size - lost for size, lost in zip(sizes, gone, strict=True)]
