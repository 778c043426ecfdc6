"""JetMoE: experts that get their rows sorted, from a router that also tells how many are whose."""

from typing import Any

import torch
from torch import Tensor, nn

from ..types import ExpertFormat, ExpertWeights, MoeLayer
from .base import FAMILIES, MapHooks, MoeFamily
from .fused import split_gate_up

INWARD, OUTWARD = "input_linear.weight", "output_linear.weight"


class SortedExperts(MoeFamily):
    """`input_linear` (N, 2 I, D) and `output_linear` (N, D, I) beside their router, in a block with one bias for all.

    The attention of JetMoE has experts too (MoA), without gate; they stay as they are.
    """

    not_formed_because = "JetMoE gives its experts sorted rows with a shared bias"

    layouts = ("mapped",)
    not_native_because = "its configuration has one number of experts for this layer and for the attention experts"
    observes_router = True

    def match(self, name: str, module: nn.Module) -> bool:  # noqa: ARG002
        parameters = dict(module.named_parameters())
        weights = [parameters.get(INWARD), parameters.get(OUTWARD)]
        if any(weight is None or weight.dim() != 3 for weight in weights) or not hasattr(module, "router"):
            return False
        return weights[0].shape[1] == 2 * weights[1].shape[2]  # the attention experts have no gate

    def describe(self, name: str, module: nn.Module, modules: dict[str, nn.Module], config: Any) -> MoeLayer:  # noqa: ARG002
        num_experts, hidden_size, width = module.output_linear.weight.shape
        expert_map = modules.get(f"{name}.expert_map")
        return MoeLayer(
            name=name,
            experts=module,
            router_name=f"{name}.router",
            router=module.router,
            block_name=name,
            block=module,
            num_slots=expert_map.index.numel() if expert_map is not None else num_experts,
            num_experts=num_experts,
            top_k=module.router.top_k,
            hidden_size=hidden_size,
            intermediate_size=width,
            format=ExpertFormat(),
            family=self,
            experts_per_group=module.router.top_k,
        )

    def expert_parameters(self, layer: MoeLayer) -> dict[str, Tensor]:
        return {name: layer.experts.get_parameter(name) for name in (INWARD, OUTWARD)}

    def stored_experts(self, layer: MoeLayer) -> int:
        return layer.experts.output_linear.weight.shape[0]

    def view(self, layer: MoeLayer, stacked: dict[str, Tensor]) -> ExpertWeights:  # noqa: ARG002
        gate, up = split_gate_up(stacked[INWARD], is_interleaved=False)
        return ExpertWeights(gate=gate, up=up, down=stacked[OUTWARD])

    def routed_by_router(self, layer: MoeLayer, args: tuple, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        order, _, gates, sizes, _ = output
        index, weights = torch.empty_like(order), torch.empty_like(gates)
        index[order], weights[order] = sorted_slots(sizes, order.device), gates
        return args[0], index.view(-1, layer.top_k), weights.view(-1, layer.top_k)

    def run_experts(self, layer: MoeLayer, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        block = layer.experts
        if hasattr(block, "expert_map"):
            index, weights = block.expert_map(index, weights, can_skip=False)
        experts, order = index.flatten().sort(stable=True)
        tokens = order // index.shape[1]
        sizes = experts.bincount(minlength=self.stored_experts(layer)).tolist()
        gate, up = block.input_linear(hidden_states[tokens], sizes).chunk(2, dim=-1)
        outputs = block.output_linear(block.activation(gate) * up, sizes) * weights.flatten()[order, None]
        return torch.zeros_like(hidden_states).index_add(0, tokens, outputs)

    def map_hooks(self, layer: MoeLayer) -> MapHooks:
        return MapHooks(layer.router, after=sort_by_expert)


def sorted_slots(sizes: list[int], device: torch.device) -> Tensor:
    """The slot of each sorted row, (T k,) int64."""
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))


def sort_by_expert(expert_map: nn.Module, output: tuple) -> tuple:
    """What the router returns, with rows sorted by stored expert; rows of a dropped slot have gate 0."""
    order, tokens, gates, sizes, logits = output
    experts, gates = expert_map(sorted_slots(sizes, order.device), gates, can_skip=False)
    experts, rows = experts.sort(stable=True)
    sizes = experts.bincount(minlength=expert_map.num_experts).tolist()
    return order[rows], tokens[rows], gates[rows], sizes, logits


FAMILIES.append(SortedExperts())
