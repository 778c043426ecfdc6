"""One budget for all layers, spent on the most used experts wherever they are."""

from torch import Tensor

from ..allocation import ALLOCATION
from .limits import limits


@ALLOCATION.register("global_usage")
def allocate_by_global_usage(
    saliency_of_layer: list[Tensor],
    budget_of_layer: list[int],
    *,
    min_experts: int = 1,
    max_experts: int | None = None,
) -> list[int]:
    """Rank the experts of all layers together and count how many of the best lie in each layer.

    The adaptive layer-wise ratio of M-SMoE (Li et al., 2024, section 3.2, https://arxiv.org/abs/2310.01334).
    Deviation: the public code thresholds strictly, which loses experts on ties; here every layer's best
    `min_experts` are reserved and the rest of the budget goes to the largest scores, ties to the lower
    (layer, expert), so the total is always exact. The rule gives layers with balanced routing all their
    experts or few of them; `min_experts` and `max_experts` soften that.

    Args:
        saliency_of_layer: One (N,) tensor per layer, comparable across layers (usage frequencies are).
        budget_of_layer: How many experts each layer would keep on average; only their sum counts.
        min_experts: Least number of experts a layer keeps.
        max_experts: Largest number of experts a layer keeps; None for no limit.

    Returns:
        Experts per layer; they add up to `sum(budget_of_layer)`.

    Raises:
        ValueError: The limits leave no way to spend the budget exactly.
    """
    total = sum(budget_of_layer)
    sizes = [saliency.numel() for saliency in saliency_of_layer]
    most = limits(sizes, total, min_experts, max_experts)
    order_of_layer = [saliency.argsort(descending=True, stable=True).tolist() for saliency in saliency_of_layer]
    allotted = [min_experts] * len(sizes)
    candidates = sorted(
        (-saliency_of_layer[layer][expert].item(), layer, expert)
        for layer, order in enumerate(order_of_layer)
        for expert in order[min_experts : most[layer]]
    )
    for _, layer, _ in candidates[: total - sum(allotted)]:
        allotted[layer] += 1
    return allotted
