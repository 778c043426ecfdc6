"""What a layer was given on some tokens: kept to run it again, as it was and as it becomes."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..types import MoeLayer


@dataclass
class LayerInputs:
    """Inputs of the experts and of the router of one layer, batch by batch."""

    experts_inputs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # (t, D), (t, k), (t, k)
    router_calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)  # the residual stream after the layer, (t, D), if asked for
    outputs: list[Tensor] = field(default_factory=list)  # what the experts gave, (t, D), if asked for and to be had
    # What the layer is to give beyond what its original experts give, (t, D) float32; empty: nothing.
    corrections: list[Tensor] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """No token was seen."""
        return not self.experts_inputs

    @property
    def num_tokens(self) -> int:
        """Tokens kept."""
        return sum(hidden_states.shape[0] for hidden_states, _, _ in self.experts_inputs)

    def router_call(self, position: int, block: nn.Module) -> tuple[tuple, dict[str, Any]]:
        """Arguments of one call of the router; tensors that `block` owns are those that it has now."""
        args, kwargs = self.router_calls[position]
        with align_module_device(block):
            now = tuple(getattr(block, v.name) if isinstance(v, TensorOfBlock) else v for v in args)
            named = {n: getattr(block, v.name) if isinstance(v, TensorOfBlock) else v for n, v in kwargs.items()}
        return now, named


@dataclass(frozen=True)
class TensorOfBlock:
    """Stands for an argument of a router that its parent keeps, such as a correction bias."""

    name: str


def ignore_passive(index: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`index` and `weights` (T, k) in which slots of no routed expert (index >= num_experts) have weight 0."""
    passive = index >= num_experts
    return index.masked_fill(passive, 0), weights.masked_fill(passive, 0)


def gives_routed_output(layer: MoeLayer) -> bool:
    """Whether a call of the experts module gives what routed experts give, and nothing else."""
    return not (layer.family.observes_router or layer.num_passive_rows)


@torch.no_grad()
def routed_output(layer: MoeLayer, inputs: LayerInputs, reroute: bool = False) -> list[Tensor]:
    """What the layer's experts give for the kept tokens, one (t, D) tensor a batch.

    Args:
        layer: In its present state.
        inputs: Of the experts and of the router.
        reroute: Ask the router again, for layouts that change it, instead of using the choice that was kept.
    """
    return [
        layer.family.run_experts(layer, hidden_states, *choice(layer, inputs, position, reroute))
        for position, (hidden_states, _, _) in enumerate(inputs.experts_inputs)
    ]


def targets_of(outputs: list[Tensor], inputs: LayerInputs) -> list[Tensor]:
    """What a layer is to give for the kept tokens: what its original experts give, and the corrections, if any."""
    if not inputs.corrections:
        return outputs
    return [output.float() + correction for output, correction in zip(outputs, inputs.corrections, strict=True)]


@torch.no_grad()
def choice(layer: MoeLayer, inputs: LayerInputs, position: int, reroute: bool) -> tuple[Tensor, Tensor]:
    """(index (t, k), weights (t, k)) of one batch: the router's choice that was kept, or what it says now."""
    _, index, weights = inputs.experts_inputs[position]
    if not reroute:
        return index, weights
    is_beyond = (weights == 0).all(-1, keepdim=True) & layer.family.has_capacity
    index, weights = layer.family.route(layer, *inputs.router_call(position, layer.block))
    index, weights = ignore_passive(index, weights, slots_now(layer))
    return index, weights.masked_fill(is_beyond, 0)


def slots_now(layer: MoeLayer) -> int:
    """Slots of the router that lead to routed experts: N, or M where the router was cut."""
    is_mapped = hasattr(layer.experts, "expert_map")
    return layer.num_slots if is_mapped else layer.family.stored_experts(layer)


def relative_error(before: list[Tensor], after: list[Tensor]) -> float | None:
    """|after - before|^2 / |before|^2 over all tokens; None without tokens or where the output was all zero."""
    pairs = list(zip(before, after, strict=True))
    change = sum((new.double() - old.double()).square().sum().item() for old, new in pairs)
    energy = sum(old.double().square().sum().item() for old in before)
    return change / energy if energy > 0 else None


def tokens_of_batch(limit: int, num_batches: int) -> int:
    """How many tokens to keep of each of `num_batches` batches, so that about `limit` are kept in all."""
    return math.ceil(limit / num_batches) if num_batches else 0
