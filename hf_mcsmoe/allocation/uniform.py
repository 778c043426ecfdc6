"""The same number of experts in every layer."""

from torch import Tensor

from ..allocation import ALLOCATION


@ALLOCATION.register("uniform")
def allocate_uniformly(saliency_of_layer: list[Tensor], budget_of_layer: list[int]) -> list[int]:
    """Give every layer its own share of the budget.

    Args:
        saliency_of_layer: One (N,) tensor per layer; not used.
        budget_of_layer: How many experts the recipe asks of each layer on average.

    Returns:
        `budget_of_layer`.
    """
    assert len(saliency_of_layer) == len(budget_of_layer)
    return list(budget_of_layer)
