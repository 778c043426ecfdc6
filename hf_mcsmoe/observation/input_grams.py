"""Gram matrices of what each stored expert multiplies its matrices with, for decomposition in their metric."""

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..modeling.offload import fetched
from ..types import ExpertWeights, MoeLayer
from .gated_features import dense_gates, sum_input_grams
from .layer_inputs import LayerInputs
from .token_batches import RoutedTokens


@torch.no_grad()
def input_grams(layer: MoeLayer, inputs: LayerInputs) -> dict[str, list[Tensor]]:
    """Sums over tokens of the outer products of the inputs of every matrix of a layer's experts.

    A token counts for the experts that it goes to with a weight other than 0, once for each. Products are float32.

    Args:
        layer: With dense experts, original or merged.
        inputs: What the layer was given as it is now, e.g. `collect(...)[layer.name].calibration`.

    Returns:
        "up", and "gate" where there is one: (D, D) for each of the M experts; "down": (I, I). float64 (float32 where
        the device has none), as `decompose_experts` takes them; zeros for an expert that no token goes to.
    """
    with fetched(layer.experts):
        stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
        tensors = layer.family.view(layer, stacked).tensors()
        experts = PackedExperts.from_dense(ExpertWeights(**{name: t.float() for name, t in tensors.items()}))
        activation = layer.family.activation(layer)
    tokens = (
        RoutedTokens(hidden_states, dense_gates(index, weights, experts.num_experts), targets=hidden_states)
        for hidden_states, index, weights in inputs.experts_inputs
    )
    return sum_input_grams(experts, activation, tokens)
