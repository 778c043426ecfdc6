"""What a layer's output loses neuron by neuron, measured on the tokens that it was given before it is compressed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..executors.in_memory import Collected
from ..observation.gated_features import sum_features
from ..observation.kept_features import KeptFeatures
from ..observation.layer_tokens import original_tokens
from ..observation.sinks import with_bounded_sinks
from ..recipe import Recipe
from ..selection import SELECTION
from ..selection.gated_obs import saliency_by_gated_obs
from ..selection.joint_obs import is_above, joint_removals
from ..types import MoeLayer
from . import fit
from .parts import in_parts

RULE = "joint_obs"  # the selection whose order the neurons go in


@dataclass(frozen=True, eq=False)
class LayerNeurons:
    """How many neurons a layer keeps in its experts together, and which, where that is known already."""

    number: int
    saliency: Tensor | None = None  # (P,) float64, of all neurons, as a selection gives it


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """What a layer's output loses as its neurons go one by one, those that matter least first."""

    saliency: Tensor  # (P,) float64: the larger, the later a neuron goes; those that stay come last
    costs: Tensor  # (P,) float64: what each removal adds to the mean squared error of a token; inf: of those that stay


@torch.no_grad()
def removal_curve(layer: MoeLayer, recipe: Recipe, collected: Collected, least: int) -> RemovalCurve:
    """Take all neurons but `least` from a layer, on paper: the layer is left as it is.

    Neurons go as the selection `joint_obs` takes them, with its options where the recipe selects so, from the neurons
    of all experts together. What the first n removals cost is by how much they raise the least squared error of the
    layer's output, the selection's ridge included, when the down projections of all neurons that are left are fitted
    again: the error on the kept tokens themselves, none of which is held out, with sinks bounded as in a fit. Layers
    with more than `MOST_JOINT_NEURONS` neurons take order and costs from `gated_obs`, where only neurons of the same
    expert make up for each other.

    Args:
        layer: As found in the original model.
        recipe: Of the compression; all experts stay.
        collected: What the layer was given, with kept tokens.
        least: Neurons that stay in all experts together, >= 1.

    Returns:
        On the CPU. Costs are 0 where no kept token gave the layer a feature. Time O(P^3), or O(I^3) for each expert;
        memory as for the selection.
    """
    tokens = original_tokens(layer, collected)
    experts, batches = tokens.features.experts, with_bounded_sinks(tokens.calibration)
    is_known = tokens.features.serves(experts, batches)
    features = tokens.features if is_known else KeptFeatures(experts, tokens.activation, batches)
    num_tokens = max(1, sum(len(batch.gates) for batch in batches))
    judged, seen = in_parts(experts, batches)
    grams = fit.grams_of(features if judged is experts else KeptFeatures(judged, tokens.activation, seen))
    sums = None
    if experts.num_neurons <= fit.MOST_JOINT_NEURONS:
        sums = sum_features(experts, tokens.activation, batches, features)
    budget = least, fit.least_width(least, experts.num_experts, is_uniform=False)
    found = joint_removals(experts, grams, sums, budget, **options_of_order(recipe))
    if found is not None:
        order, costs = (tensor.cpu() for tensor in found)
        saliency = torch.empty(len(order), dtype=torch.float64)
        saliency[order] = torch.arange(len(order), dtype=torch.float64)
    else:
        saliency = saliency_by_gated_obs(judged, grams=grams).cpu().double()
        order = saliency.argsort(stable=True)
        free = order[is_above(experts.expert_of_neuron.cpu()[order], budget[1])][: experts.num_neurons - least]
        costs = saliency[free] if any(gram.any() for gram in grams) else torch.zeros(len(free))
    stay = torch.full((experts.num_neurons - len(costs),), torch.inf, dtype=torch.float64)
    return RemovalCurve(saliency, torch.cat([costs.double() / num_tokens, stay]))


def options_of_order(recipe: Recipe) -> dict[str, Any]:
    """Options of `joint_obs`: the recipe's where it selects so, else the defaults."""
    asked = recipe.selection_options if recipe.selection == RULE else {}
    return SELECTION.options(RULE) | asked
