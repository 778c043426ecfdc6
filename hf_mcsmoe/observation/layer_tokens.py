"""The kept calibration tokens of one layer as its experts see them: hidden states, gates and what they should give."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..executors.in_memory import Collected
from ..expert_values import PackedExperts
from ..layer.fit import routed_tokens, with_answers
from ..modeling.offload import fetched
from ..types import ExpertWeights, MoeLayer
from .gated_features import Activation
from .kept_features import KeptFeatures
from .layer_inputs import LayerInputs, targets_of
from .native_gates import native_gates
from .token_batches import RoutedTokens


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """What the experts of a layer see of the kept tokens, and the function between their matrices."""

    activation: Activation
    assignment: Tensor  # (slots, M) float32: 1 where a slot of the router goes to an expert
    calibration: list[RoutedTokens]  # gates (t, M); targets, of recipes that fit, are what the layer is to give
    held_out: list[RoutedTokens]
    # (router rows (M,), places of calibration batches) -> gates (t, N) of these batches if only those rows were there.
    gates_of_kept: Callable[[Tensor, Sequence[int]], list[Tensor]] | None = None  # of the original experts only
    features: KeptFeatures | None = None  # of the original experts on the calibration tokens, under their gates


def as_float32(weights: ExpertWeights) -> PackedExperts:
    """All neurons of experts of one width, in float32."""
    return PackedExperts.from_dense(ExpertWeights(**{name: t.float() for name, t in weights.tensors().items()}))


def original_tokens(layer: MoeLayer, collected: Collected, *, with_targets: bool = True) -> LayerTokens:
    """The kept tokens for the N experts of a layer that was not changed yet.

    Memory: N numbers for each token; with targets, all experts in float32 meanwhile, D numbers for each token, and
    `KeptFeatures`.

    Args:
        layer: As found.
        collected: What it was given.
        with_targets: Run the experts for what they give.
    """
    assignment = torch.eye(layer.num_slots)
    calibration, held_out = (
        routed_tokens(layer, inputs, assignment, [None] * len(inputs.experts_inputs), reroute=False)
        for inputs in (collected.calibration, collected.held_out)
    )
    features, activation = None, layer.family.activation(layer)
    if with_targets:
        with fetched(layer.experts):
            stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
            original = as_float32(layer.family.view(layer, stacked))
            features = KeptFeatures(original, activation, calibration)
            calibration = with_targets_of(features, collected.calibration)
            held_out = with_targets_of(KeptFeatures(original, activation, held_out), collected.held_out)
    gates_of_kept = functools.partial(native_gates, layer, collected.calibration)
    return LayerTokens(activation, assignment, calibration, held_out, gates_of_kept, features)


def with_targets_of(features: KeptFeatures, inputs: LayerInputs) -> list[RoutedTokens]:
    """Batches whose targets are what the original experts give, with the corrections that the layer is to make.

    What the experts gave was kept, or else they run again.
    """
    answers = inputs.outputs or [batch.targets for batch in with_answers(features)]
    targets = targets_of([answer.float() for answer in answers], inputs)
    return [dataclasses.replace(batch, targets=t) for batch, t in zip(features.batches, targets, strict=True)]


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
    return LayerTokens(original.activation, assignment, *tokens, features=original.features)
