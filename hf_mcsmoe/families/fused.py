"""The standard of transformers 5: experts as 3-D parameters, called with the router's choice and weights."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from ..types import ExpertFormat, ExpertWeights, MoeLayer
from .base import FAMILIES, ROUTED_ARGUMENTS, MoeFamily
from .names import GROUP_NAMES, TOP_GROUP_NAMES, TOP_K_NAMES, count_passive_rows, find_router, read_attribute


class FusedExperts(MoeFamily):
    """Every family whose experts are `gate_up_proj` (or `up_proj`) and `down_proj` with experts in dimension 0.

    It asks the module for flags, attributes and shapes and knows no class names.
    """

    def match(self, name: str, module: nn.Module) -> bool:
        parameters = dict(module.named_parameters(recurse=False))
        three_dimensional = {n for n, p in parameters.items() if p.dim() == 3}
        if "down_proj" not in three_dimensional or not {"gate_up_proj", "up_proj"} & three_dimensional:
            return False
        # Shared experts may be stored the same way, but no router chooses among them.
        arguments = len(inspect.signature(type(module).forward).parameters) - 1
        return "shared" not in name.rpartition(".")[2] and arguments >= ROUTED_ARGUMENTS

    def describe(self, name: str, module: nn.Module, modules: dict[str, nn.Module], config: Any) -> MoeLayer | None:
        parameters = dict(module.named_parameters(recurse=False))
        expert_format = read_format(module, parameters)
        num_experts = parameters["down_proj"].shape[0]
        expert_map = modules.get(f"{name}.expert_map")
        # Identity experts have rows in the first matrix, which are never read, but none in the second.
        num_identity = first_matrix(parameters).shape[0] - num_experts
        num_slots = expert_map.index.numel() - num_identity if expert_map is not None else num_experts
        found = find_router(name, modules, num_slots)
        if found is None:
            return None
        router_name, block_name = found
        router, block = modules[router_name], modules[block_name]
        owners = (router, block, getattr(module, "config", None), config and config.get_text_config())
        top_k = read_attribute(TOP_K_NAMES, *owners) or 1
        num_router_groups = read_attribute(GROUP_NAMES, *owners) or 1
        top_groups = read_attribute(TOP_GROUP_NAMES, *owners) or 1
        first, last = parameters["down_proj"].shape[1:]
        return MoeLayer(
            name=name,
            experts=module,
            router_name=router_name,
            router=router,
            block_name=block_name,
            block=block,
            num_slots=num_slots,
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=last if expert_format.is_transposed else first,
            intermediate_size=first if expert_format.is_transposed else last,
            format=expert_format,
            family=self,
            num_router_groups=num_router_groups,
            # Group-limited routers score a group by the sum of its best two experts.
            experts_per_group=top_k if num_router_groups == 1 else max(2, math.ceil(top_k / top_groups)),
            num_passive_rows=count_passive_rows(router, num_slots, num_identity),
            num_identity_slots=num_identity,
        )

    def expert_parameters(self, layer: MoeLayer) -> dict[str, Tensor]:
        named = layer.experts.named_parameters(recurse=False)
        rows = (layer.num_experts, layer.num_experts + layer.num_identity_slots)
        return {name: p for name, p in named if p.dim() >= 2 and p.shape[0] in rows}

    def stored_experts(self, layer: MoeLayer) -> int:
        return layer.experts.down_proj.shape[0]

    def view(self, layer: MoeLayer, parameters: dict[str, Tensor]) -> ExpertWeights:
        expert_format = layer.format
        num_experts = parameters["down_proj"].shape[0]
        oriented = {
            name: p[:num_experts].transpose(1, 2) if expert_format.is_transposed and p.dim() == 3 else p[:num_experts]
            for name, p in parameters.items()
        }
        fields = {"down": oriented["down_proj"], "down_bias": oriented.get("down_proj_bias")}
        if not expert_format.has_gate:
            return ExpertWeights(up=oriented["up_proj"], up_bias=oriented.get("up_proj_bias"), **fields)
        gate, up = split_gate_up(oriented["gate_up_proj"], expert_format.is_interleaved)
        gate_bias, up_bias = None, None
        if "gate_up_proj_bias" in oriented:
            gate_bias, up_bias = split_gate_up(oriented["gate_up_proj_bias"], expert_format.is_interleaved)
        return ExpertWeights(gate=gate, up=up, gate_bias=gate_bias, up_bias=up_bias, **fields)

    def unview(self, layer: MoeLayer, weights: ExpertWeights) -> dict[str, Tensor]:
        stacked = {"down_proj": weights.down, "down_proj_bias": weights.down_bias}
        if layer.format.has_gate:
            stacked["gate_up_proj"] = join_gate_up(weights.gate, weights.up, layer.format.is_interleaved)
            if weights.up_bias is not None:
                joined = join_gate_up(weights.gate_bias, weights.up_bias, layer.format.is_interleaved)
                stacked["gate_up_proj_bias"] = joined
        else:
            stacked |= {"up_proj": weights.up, "up_proj_bias": weights.up_bias}
        if layer.format.is_transposed:
            stacked = {name: t.transpose(1, 2) if t is not None and t.dim() == 3 else t for name, t in stacked.items()}
        kept = {name: t for name, t in stacked.items() if t is not None}
        return {name: t.clone(memory_format=torch.contiguous_format) for name, t in kept.items()}

    def no_forms_because(self, layer: MoeLayer) -> str:
        needed = "_apply_gate" if layer.format.has_gate else "act_fn"
        if self.not_formed_because or hasattr(layer.experts, needed):
            return self.not_formed_because
        return f"their class {type(layer.experts).__name__} does not tell its activation as {needed!r}"

    def activation(self, layer: MoeLayer) -> Callable[[Tensor, Tensor | None], Tensor]:
        if not layer.format.has_gate:
            return functools.partial(activate, layer.experts)
        return functools.partial(
            activate_interleaved if layer.format.is_interleaved else activate_gated, layer.experts
        )

    def finish(self, experts: nn.Module, output: Tensor) -> Tensor:
        return experts.post_expert_norm(output) if getattr(experts, "has_post_expert_norm", False) else output

    def route(self, layer: MoeLayer, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        output = layer.router(*args, **kwargs)
        return output[2], output[1]

    def expert_tables(self, layer: MoeLayer) -> list[tuple[nn.Module, str]]:
        found = [(module, *item) for module in layer.router.modules() for item in module.named_buffers(recurse=False)]
        return [(module, name) for module, name, t in found if t.dim() == 2 and not t.is_floating_point()]


def first_matrix(parameters: dict[str, Tensor]) -> Tensor:
    """The parameter that the input of an expert is multiplied with."""
    return parameters["gate_up_proj"] if "gate_up_proj" in parameters else parameters["up_proj"]


def read_format(module: nn.Module, parameters: dict[str, Tensor]) -> ExpertFormat:
    """The flags of `use_experts_implementation`, or what the parameters' names say where it is not used."""
    return ExpertFormat(
        has_gate=getattr(module, "has_gate", "gate_up_proj" in parameters),
        has_bias=getattr(module, "has_bias", "down_proj_bias" in parameters),
        is_transposed=getattr(module, "is_transposed", False),
        is_interleaved=not getattr(module, "is_concatenated", True),
    )


def split_gate_up(stacked: Tensor, is_interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the gate and up halves of (N, 2 I, ...) along dimension 1."""
    if is_interleaved:
        return stacked[:, ::2], stacked[:, 1::2]
    width = stacked.shape[1] // 2
    return stacked[:, :width], stacked[:, width:]


def join_gate_up(gate: Tensor, up: Tensor, is_interleaved: bool) -> Tensor:
    """The inverse of `split_gate_up`, as a copy."""
    return torch.stack([gate, up], dim=2).flatten(1, 2) if is_interleaved else torch.cat([gate, up], dim=1)


def activate(module: nn.Module, up: Tensor, gate: None) -> Tensor:  # noqa: ARG001
    """The activation of experts without a gate."""
    return module.act_fn(up)


def activate_gated(module: nn.Module, up: Tensor, gate: Tensor) -> Tensor:
    """The activation of experts whose first matrix has all gate rows before all up rows."""
    if type(module)._apply_gate is _default_apply_gate:
        return module.act_fn(gate) * up  # what it does, without putting the two together first
    return module._apply_gate(torch.cat([gate, up], dim=-1))


def activate_interleaved(module: nn.Module, up: Tensor, gate: Tensor) -> Tensor:
    """The activation of experts whose first matrix has gate and up rows in turn."""
    return module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))


FAMILIES.append(FusedExperts())
