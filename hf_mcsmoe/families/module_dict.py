"""Experts as modules `expert_0` ... `expert_{N-1}` of a ModuleDict: Switch Transformers and NLLB-MoE."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..types import ExpertFormat, ExpertWeights, MoeLayer
from .base import FAMILIES, MapHooks, MoeFamily

EXPERT_NAME = re.compile(r"expert_\d+")


class ModuleDictExperts(MoeFamily):
    """Experts of two linear layers without a gate, called as (hidden_states, index (T, k), weights (T, k)).

    NLLB-MoE of transformers 5 gives the experts the 0/1 mask (T, N) of its router's first choices where they
    expect expert ids. What runs is thus a call with k = N slots: expert 1 for each token's first choice, expert 0
    for its second, both with the right weight, and nothing for the other experts (https://github.com/huggingface/
    transformers, `NllbMoeExperts.forward`). This family treats exactly what is executed: only slots with a non-zero
    weight count, and the map acts on those ids. In the native layout the ids 0 and 1 mean the first two that stay.
    """

    has_capacity = True
    call_argument = None  # name of the second argument of the experts' forward; None takes any

    def match(self, name: str, module: nn.Module) -> bool:  # noqa: ARG002
        if not isinstance(module, nn.ModuleDict) or not any(EXPERT_NAME.fullmatch(key) for key in module):
            return False
        return self.call_argument is None or self.call_argument in inspect.signature(module.forward).parameters

    def describe(self, name: str, module: nn.Module, modules: dict[str, nn.Module], config: Any) -> MoeLayer | None:
        parameters = list(module["expert_0"].parameters())
        width, hidden_size = next(p for p in parameters if p.dim() == 2).shape
        layer = self.layer_around(
            name,
            modules,
            config,
            num_experts=count_experts(module),
            hidden_size=hidden_size,
            intermediate_size=width,
            expert_format=ExpertFormat(has_gate=False, has_bias=any(p.dim() == 1 for p in parameters)),
        )
        if layer is not None and hasattr(layer.router, "second_expert_policy"):
            return dataclasses.replace(layer, top_k=2, experts_per_group=2)
        return layer

    def expert_parameters(self, layer: MoeLayer) -> dict[str, Tensor]:
        return dict(layer.experts.named_parameters())

    def stack(self, layer: MoeLayer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        kinds = [name.removeprefix("expert_0.") for name in parameters if name.startswith("expert_0.")]
        experts = range(len(parameters) // len(kinds))
        return {kind: torch.stack([parameters[f"expert_{expert}.{kind}"] for expert in experts]) for kind in kinds}

    def unstack(self, layer: MoeLayer, stacked: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        return {
            f"expert_{expert}.{kind}": tensor.clone()
            for kind, tensors in stacked.items()
            for expert, tensor in enumerate(tensors)
        }

    def stored_experts(self, layer: MoeLayer) -> int:
        return count_experts(layer.experts)

    def view(self, layer: MoeLayer, stacked: dict[str, Tensor]) -> ExpertWeights:  # noqa: ARG002
        first, second = (name for name, tensor in stacked.items() if tensor.dim() == 3)
        biases = [stacked.get(name.removesuffix("weight") + "bias") for name in (first, second)]
        return ExpertWeights(up=stacked[first], down=stacked[second], up_bias=biases[0], down_bias=biases[1])

    def unview(self, layer: MoeLayer, weights: ExpertWeights) -> dict[str, Tensor]:
        kinds = {name: p.dim() for name, p in layer.experts["expert_0"].named_parameters()}
        first, second = (name.removesuffix("weight") for name, dim in kinds.items() if dim == 2)
        named = {f"{first}weight": weights.up, f"{second}weight": weights.down}
        named |= {f"{first}bias": weights.up_bias, f"{second}bias": weights.down_bias}
        return {name: named[name].clone(memory_format=torch.contiguous_format) for name in kinds}

    def no_forms_because(self, layer: MoeLayer) -> str:
        return "" if activation_of(layer) is not None else "its experts do not tell their activation as 'act'"

    def activation(self, layer: MoeLayer) -> Callable[[Tensor, Tensor | None], Tensor]:
        return functools.partial(activate, activation_of(layer))

    def finish(self, experts: nn.Module, output: Tensor) -> Tensor:
        rate = getattr(experts, "moe_token_dropout", 0)
        if rate == 0:
            return output
        return experts.token_dropout(output) if experts.training else output * (1 - rate)

    def route(self, layer: MoeLayer, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        # Without the padding mask: the sampled tokens are all real.
        mask, weights, _ = layer.router(args[0])
        return mask, weights


class OneHotExperts(ModuleDictExperts):
    """Experts called with the router's choice as one-hot rows (T, 1, N), zero for a token beyond an expert's capacity.

    Capacity is per router slot and stays that of the original router in the mapped layout: slots of one merged
    expert do not compete. The relative error of a native layer takes the same tokens as beyond capacity as before.
    """

    call_argument = "selected_experts"

    def routed_inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        hidden_states, one_hot, weights = super().routed_inputs(args, kwargs)
        # A token beyond capacity has weight 0: it is not counted for expert 0, where the argmax of zeros points.
        return hidden_states, one_hot.argmax(-1), weights * one_hot.sum(-1)

    def run_experts(self, layer: MoeLayer, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return layer.experts(hidden_states, nn.functional.one_hot(index, layer.num_slots), weights)

    def map_hooks(self, layer: MoeLayer) -> MapHooks:
        return MapHooks(layer.experts, before=map_one_hot)

    def route(self, layer: MoeLayer, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        # Each token as a sequence of its own, because the sampled tokens are not one sequence that fills experts.
        one_hot, weights, _ = layer.router(args[0].flatten(0, -2)[:, None])
        return one_hot.argmax(-1), weights[:, 0]


def activation_of(layer: MoeLayer) -> Callable[[Tensor], Tensor] | None:
    """The activation function of the first expert."""
    return getattr(layer.experts["expert_0"], "act", None)


def activate(function: Callable[[Tensor], Tensor], up: Tensor, gate: None) -> Tensor:  # noqa: ARG001
    """The activation of experts without a gate."""
    return function(up)


def count_experts(module: nn.ModuleDict) -> int:
    """Experts that a ModuleDict holds, maybe beside an expert map."""
    return sum(EXPERT_NAME.fullmatch(key) is not None for key in module)


def map_one_hot(expert_map: nn.Module, args: tuple) -> tuple:
    """Arguments of `OneHotExperts` with rows over M experts (T, 1, M); the row of a dropped slot is zero."""
    hidden_states, one_hot, weights = args
    index = expert_map.index.to(one_hot.device)
    merged = one_hot.new_zeros(*one_hot.shape[:-1], expert_map.num_experts)
    return hidden_states, merged.index_add_(-1, index.clamp(min=0), one_hot * (index >= 0)), weights


FAMILIES.extend([OneHotExperts(), ModuleDictExperts()])
