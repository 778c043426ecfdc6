"""The experts of one layer become parts of what they share; all of them stay, and so does the router."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..modeling.install_forms import install_shared
from ..modeling.offload import fetched
from ..recipe import Recipe
from ..saliency import SALIENCY
from ..shared_base import SHARED_BASE
from ..types import LayerStatistics, MoeLayer
from .merging import MergedLayer

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens


@torch.no_grad()
def share_experts(
    layer: MoeLayer,
    recipe: Recipe,
    merged: MergedLayer,
    statistics: LayerStatistics,
    original: "Callable[[], LayerTokens]",
    layout: dict[str, Any],
) -> None:
    """Put experts that share a part into a layer, in place; `layout` gets what their form adds to it.

    Args:
        layer: As found in the original model.
        recipe: With `shared_base`.
        merged: All N experts as they are, behind the identity map.
        statistics: Of the layer.
        original: The kept tokens; made only for a rule that asks for them.
        layout: The layer's entry in a mapped checkpoint.
    """
    with fetched(layer.experts):
        weights = layer.family.view(layer, merged.parameters)
        supply = {
            "importance": lambda: SALIENCY[recipe.importance](statistics, weights, **recipe.importance_options),
            "statistics": lambda: statistics,
            "tokens": original,
        }
        how = {"options": recipe.shared_base_options, "supply": supply}
        shared = SHARED_BASE.call(recipe.shared_base, weights, recipe.keep, **how)
    install_shared(layer, shared, merged.routing.slot_map, layout)
