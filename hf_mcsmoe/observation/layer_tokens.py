"""The kept calibration tokens of one layer as its experts see them: hidden states, gates and what they should give."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..executors.in_memory import Collected
from ..expert_values import PackedExperts
from ..layer.fit import original_output, routed_tokens
from ..modeling.offload import fetched
from ..types import ExpertWeights, MoeLayer
from .gated_features import Activation, RoutedTokens
from .layer_inputs import targets_of
from .native_gates import native_gates


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """What the experts of a layer see of the kept tokens, and the function between their matrices."""

    activation: Activation
    assignment: Tensor  # (slots, M) float32: 1 where a slot of the router goes to an expert
    calibration: list[RoutedTokens]  # gates (t, M); targets are what the layer is to give
    held_out: list[RoutedTokens]
    # (router rows (M,), places of calibration batches) -> gates (t, N) of these batches if only those rows were there.
    gates_of_kept: Callable[[Tensor, Sequence[int]], list[Tensor]] | None = None  # of the original experts only


def as_float32(weights: ExpertWeights) -> PackedExperts:
    """All neurons of experts of one width, in float32."""
    return PackedExperts.from_dense(ExpertWeights(**{name: t.float() for name, t in weights.tensors().items()}))


def original_tokens(layer: MoeLayer, collected: Collected) -> LayerTokens:
    """The kept tokens for the N experts of a layer that was not changed yet.

    Memory: all experts in float32 meanwhile; N + D numbers for each token.
    """
    with fetched(layer.experts):
        stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
        original = as_float32(layer.family.view(layer, stacked))
        activation = layer.family.activation(layer)
        kept = [
            (inputs, targets_of(original_output(original, activation, inputs), inputs))
            for inputs in (collected.calibration, collected.held_out)
        ]
    assignment = torch.eye(layer.num_slots)
    tokens = [routed_tokens(layer, inputs, assignment, outputs, reroute=False) for inputs, outputs in kept]
    gates_of_kept = functools.partial(native_gates, layer, collected.calibration)
    return LayerTokens(activation, assignment, *tokens, gates_of_kept)


def tokens_of_result(
    layer: MoeLayer, collected: Collected, original: LayerTokens, assignment: Tensor, *, reroute: bool
) -> LayerTokens:
    """The kept tokens under the gates that the result will apply.

    Args:
        layer: With the router that the result will have.
        collected: What the layer was given.
        original: From `original_tokens`.
        assignment: (slots, M).
        reroute: The router is not the one whose choice was kept.
    """
    kept = ((collected.calibration, original.calibration), (collected.held_out, original.held_out))
    tokens = [
        routed_tokens(layer, inputs, assignment, [batch.targets for batch in batches], reroute=reroute)
        for inputs, batches in kept
    ]
    return LayerTokens(original.activation, assignment, *tokens)
