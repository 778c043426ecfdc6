"""DBRX: the experts one below the other in 2-D parameters; top-k in the block."""

from typing import Any

from torch import Tensor, nn

from ..types import ExpertFormat, ExpertWeights, MoeLayer
from .base import FAMILIES, MoeFamily

GATE, UP, DOWN = "mlp.w1", "mlp.v1", "mlp.w2"


class FlatExperts(MoeFamily):
    """`mlp.w1` (gate), `mlp.v1` (up) and `mlp.w2` (down, transposed), each (N I, D)."""

    not_formed_because = "DBRX multiplies all experts out of flat matrices"

    def match(self, name: str, module: nn.Module) -> bool:  # noqa: ARG002
        parameters = dict(module.named_parameters())
        return {GATE, UP, DOWN} <= set(parameters) and all(parameters[kind].dim() == 2 for kind in (GATE, UP, DOWN))

    def describe(self, name: str, module: nn.Module, modules: dict[str, nn.Module], config: Any) -> MoeLayer | None:
        rows, hidden_size = module.mlp.w1.shape
        return self.layer_around(
            name,
            modules,
            config,
            num_experts=rows // module.ffn_hidden_size,
            hidden_size=hidden_size,
            intermediate_size=module.ffn_hidden_size,
            expert_format=ExpertFormat(),
        )

    def expert_parameters(self, layer: MoeLayer) -> dict[str, Tensor]:
        return {name: layer.experts.get_parameter(name) for name in (GATE, UP, DOWN)}

    def stack(self, layer: MoeLayer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: p.view(-1, layer.intermediate_size, layer.hidden_size) for name, p in parameters.items()}

    def unstack(self, layer: MoeLayer, stacked: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.reshape(-1, layer.hidden_size) for name, tensor in stacked.items()}

    def stored_experts(self, layer: MoeLayer) -> int:
        return layer.experts.mlp.w1.shape[0] // layer.intermediate_size

    def view(self, layer: MoeLayer, stacked: dict[str, Tensor]) -> ExpertWeights:  # noqa: ARG002
        return ExpertWeights(gate=stacked[GATE], up=stacked[UP], down=stacked[DOWN].transpose(1, 2))

    def routed_inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        hidden_states, index, weights = super().routed_inputs(args, kwargs)
        return hidden_states.flatten(0, -2), index, weights

    def run_experts(self, layer: MoeLayer, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return layer.experts(hidden_states[None], index, weights)[0]

    def route(self, layer: MoeLayer, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        weights, index = layer.block.route_tokens_to_experts(layer.router(*args, **kwargs))
        return index, weights


FAMILIES.append(FlatExperts())
