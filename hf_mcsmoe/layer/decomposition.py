"""The merged experts of one layer become factors, as the recipe's decomposition says."""

from typing import Any

from ..modeling.install_forms import install_low_rank_sparse, install_ranked_low_rank
from ..observation.gated_features import sum_input_grams
from ..observation.layer_tokens import LayerTokens, as_float32
from ..recipe import Recipe
from ..solvers.apportion import apportion
from ..types import ExpertWeights, MoeLayer
from .expert_decomposition import decompose_experts
from .merging import MergedLayer


def decompose(
    layer: MoeLayer,
    recipe: Recipe,
    merged: MergedLayer,
    weights: ExpertWeights,
    tokens: LayerTokens | None,
    layout: dict[str, Any],
) -> None:
    """Put the decomposition of M merged experts into a layer."""
    grams = None
    if tokens is not None:
        grams = sum_input_grams(as_float32(weights), tokens.activation, tokens.calibration)
    ranks = ranks_of_experts(layer, recipe, merged) if recipe.is_ranked else None
    factors, biases = decompose_experts(weights, recipe.decomposition, recipe.decomposition_options, grams, ranks)
    install_factors = install_low_rank_sparse if ranks is None else install_ranked_low_rank
    install_factors(layer, factors, biases, merged.routing.slot_map, layout)


def ranks_of_experts(layer: MoeLayer, recipe: Recipe, merged: MergedLayer) -> list[int]:
    """The rank of each of the M experts, in proportion to how important the members of its group are together."""
    shape = (layer.intermediate_size, layer.hidden_size)
    groups = merged.groups
    importance = [merged.importance[groups.members(group)].sum().item() for group in range(groups.num_groups)]
    return apportion(importance, groups.num_groups * recipe.mean_rank(layer.num_slots, shape), 1, min(shape))
