"""Experts as separate modules in a ModuleDict (Switch Transformers, NLLB-MoE): sizes for inspect and plan."""

from typing import Any

from torch import Tensor, nn

from ..types import ExpertFormat, MoeLayer
from .base import FAMILIES, MoeFamily
from .names import TOP_K_NAMES, find_router, read_attribute


class ModuleDictExperts(MoeFamily):
    """Experts `expert_0` ... `expert_{N-1}`, each with an input and an output linear layer.

    They can be inspected and planned; no layout can be built from them yet, so `compress_moe` refuses them.
    """

    layouts = ()

    def match(self, name: str, module: nn.Module) -> bool:  # noqa: ARG002
        return isinstance(module, nn.ModuleDict) and len(module) > 0 and all(k.startswith("expert_") for k in module)

    def describe(self, name: str, module: nn.Module, modules: dict[str, nn.Module], config: Any) -> MoeLayer | None:
        num_experts = len(module)
        found = find_router(name, modules, num_experts)
        if found is None:
            return None
        router_name, block_name = found
        matrices = [p for p in next(iter(module.values())).parameters() if p.dim() == 2]
        width, hidden_size = matrices[0].shape
        return MoeLayer(
            name=name,
            experts=module,
            router_name=router_name,
            router=modules[router_name],
            block_name=block_name,
            block=modules[block_name],
            num_slots=num_experts,
            num_experts=num_experts,
            top_k=read_attribute(TOP_K_NAMES, modules[router_name], modules[block_name], config) or 1,
            hidden_size=hidden_size,
            intermediate_size=width,
            format=ExpertFormat(has_gate=False),
            family=self,
        )

    def expert_parameters(self, layer: MoeLayer) -> dict[str, Tensor]:
        return dict(layer.experts.named_parameters())


FAMILIES.append(ModuleDictExperts())
