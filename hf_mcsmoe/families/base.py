"""What a model family must tell: where routers and experts are, and how their tensors are laid out."""

from typing import Any

from torch import Tensor, nn

from ..types import ExpertWeights, MoeLayer


class MoeFamily:
    """How one way of writing MoE layers is read. Stateless; subclasses are registered in `FAMILIES`."""

    layouts: tuple[str, ...] = ("mapped", "native")

    def match(self, name: str, module: nn.Module) -> bool:
        """Whether `module` at path `name` holds the routed experts of one layer."""
        raise NotImplementedError

    def describe(self, name: str, module: nn.Module, modules: dict[str, nn.Module], config: Any) -> MoeLayer | None:
        """The layer around the experts `module`; None where it has no router."""
        raise NotImplementedError

    def expert_parameters(self, layer: MoeLayer) -> dict[str, Tensor]:
        """The parameters with one entry per expert, by name in `layer.experts`."""
        raise NotImplementedError

    def view(self, layer: MoeLayer, parameters: dict[str, Tensor]) -> ExpertWeights:
        """Views of stacked parameters in canonical orientation; writing into them writes `parameters`."""
        raise NotImplementedError

    def routed_inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden_states (T, D), top_k_index (T, k), top_k_weights (T, k)) of a call of the experts module."""
        raise NotImplementedError

    def logits_module(self, layer: MoeLayer) -> nn.Module:
        """The module whose output is, or starts with, the router logits (..., N)."""
        raise NotImplementedError

    def route(self, layer: MoeLayer, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(top_k_index, top_k_weights) that the router gives for the inputs of an earlier call."""
        raise NotImplementedError


FAMILIES: list[MoeFamily] = []


def find_layers(model: nn.Module) -> list[MoeLayer]:
    """All MoE layers of a model, in the order of its modules; empty for a dense model.

    Works on models on the meta device: only names, shapes and configuration are read.
    """
    modules = dict(model.named_modules())
    config = getattr(model, "config", None)
    layers = []
    for name, module in modules.items():
        family = next((family for family in FAMILIES if name and family.match(name, module)), None)
        layer = family.describe(name, module, modules, config) if family is not None else None
        if layer is not None:
            layers.append(layer)
    return layers
