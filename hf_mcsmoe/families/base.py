"""What a model family must tell: where routers and experts are, and how their tensors are laid out."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..types import ExpertFormat, ExpertWeights, MoeLayer
from .names import TOP_K_NAMES, find_router, read_attribute
from .shared_experts import find_shared_expert, without_ties

ROUTED_ARGUMENTS = 3  # hidden_states, top_k_index, top_k_weights


@dataclass(frozen=True)
class MapHooks:
    """Where the expert map acts in a forward pass, for experts that are not called with slots and weights."""

    module: nn.Module
    before: Callable[[nn.Module, tuple], tuple] | None = None  # (expert map, arguments of module) -> arguments
    after: Callable[[nn.Module, Any], Any] | None = None  # (expert map, output of module) -> output


class MoeFamily:
    """How one way of writing MoE layers is read. Stateless; subclasses are registered in `FAMILIES`."""

    layouts: tuple[str, ...] = ("mapped", "native")
    not_native_because: str = ""  # said when the native layout is asked for and not in `layouts`
    # The call of the experts does not show hidden states, slots and weights; the output of the router does.
    observes_router: bool = False
    # Experts that are full leave tokens without output; which ones, a router cannot tell from a sample of them.
    has_capacity: bool = False
    not_formed_because: str = ""  # why experts cannot be decomposed or have different widths; "" if they can

    def match(self, name: str, module: nn.Module) -> bool:
        """Whether `module` at path `name` holds the routed experts of one layer."""
        raise NotImplementedError

    def describe(self, name: str, module: nn.Module, modules: dict[str, nn.Module], config: Any) -> MoeLayer | None:
        """The layer around the experts `module`; None where it has no router."""
        raise NotImplementedError

    def expert_parameters(self, layer: MoeLayer) -> dict[str, Tensor]:
        """The parameters that hold the experts, by (dotted) name in `layer.experts`."""
        raise NotImplementedError

    def stack(self, layer: MoeLayer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        """`expert_parameters` with one expert per entry of dimension 0: as views where possible, or copies."""
        return parameters

    def unstack(self, layer: MoeLayer, stacked: dict[str, Tensor]) -> dict[str, Tensor]:  # noqa: ARG002
        """The inverse of `stack`, for any number of experts; no two of the tensors share memory."""
        return stacked

    def stored_experts(self, layer: MoeLayer) -> int:
        """How many experts the module of `layer` holds now; `layer.num_experts` tells how many it held when found."""
        raise NotImplementedError

    def view(self, layer: MoeLayer, stacked: dict[str, Tensor]) -> ExpertWeights:
        """Views of stacked parameters in canonical orientation; writing into them writes `stacked`."""
        raise NotImplementedError

    def unview(self, layer: MoeLayer, weights: ExpertWeights) -> dict[str, Tensor]:
        """The inverse of `view`: stacked parameters with the values of experts of any number and width, as copies."""
        raise NotImplementedError

    def routed_inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden_states (T, D), top_k_index (T, k), top_k_weights (T, k)) of a call of the experts module."""
        given = (*args, *kwargs.values())  # all callers pass them in this order
        hidden_states, top_k_index, top_k_weights = given[:ROUTED_ARGUMENTS]
        return hidden_states, top_k_index, top_k_weights

    def routed_by_router(self, layer: MoeLayer, args: tuple, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What `routed_inputs` gives, from a call of the router of a family with `observes_router`."""
        raise NotImplementedError

    def run_experts(self, layer: MoeLayer, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Output (T, D) of the routed experts for the slots `index` (T, k) with `weights` (T, k)."""
        return layer.experts(hidden_states, index, weights)

    def map_hooks(self, layer: MoeLayer) -> MapHooks | None:  # noqa: ARG002
        """How `layer.experts.expert_map` acts; None where the experts are called with slots and weights."""
        return None

    def no_forms_because(self, layer: MoeLayer) -> str:  # noqa: ARG002
        """Why the experts of a layer can have no other form than dense; "" if they can."""
        return self.not_formed_because

    def activation(self, layer: MoeLayer) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The function between an expert's matrices: (up (S, I), gate (S, I) or None) -> (S, I).

        It can be copied and pickled together with the experts module. Dropout inside of experts is left out.
        """
        raise NotImplementedError

    def finish(self, experts: nn.Module, output: Tensor) -> Tensor:  # noqa: ARG002
        """What the experts module does to the outputs of its experts (S, D) besides weighting them."""
        return output

    def logits_module(self, layer: MoeLayer) -> nn.Module:
        """The module whose output is, or holds, the router logits (..., N)."""
        # Where the scores come from a linear layer inside the router, its output are logits for certain;
        # what the router itself returns first may already be probabilities.
        for module in layer.router.modules():
            if isinstance(module, nn.Linear) and module.out_features == layer.num_slots:
                return module
        return layer.router

    def logits(self, output: Any) -> Tensor:
        """The router logits in an output of `logits_module`."""
        return output[0] if isinstance(output, tuple) else output

    def route(self, layer: MoeLayer, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(top_k_index, top_k_weights) that the router gives for the inputs of an earlier call."""
        raise NotImplementedError

    def expert_tables(self, layer: MoeLayer) -> list[tuple[nn.Module, str]]:  # noqa: ARG002
        """(module, buffer name) of tables of the router that name experts, instead of scoring them."""
        return []

    def layer_around(
        self,
        name: str,
        modules: dict[str, nn.Module],
        config: Any,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        expert_format: ExpertFormat,
    ) -> MoeLayer | None:
        """The layer of the experts at `name`, with the router beside them; None without router."""
        expert_map = modules.get(f"{name}.expert_map")
        num_slots = expert_map.index.numel() if expert_map is not None else num_experts
        found = find_router(name, modules, num_slots)
        if found is None:
            return None
        router_name, block_name = found
        router, block = modules[router_name], modules[block_name]
        top_k = read_attribute(TOP_K_NAMES, router, block, config and config.get_text_config()) or 1
        return MoeLayer(
            name=name,
            experts=modules[name],
            router_name=router_name,
            router=router,
            block_name=block_name,
            block=block,
            num_slots=num_slots,
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            format=expert_format,
            family=self,
            experts_per_group=top_k,
        )


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
            layers.append(dataclasses.replace(layer, shared=find_shared_expert(layer, modules)))
    if all(layer.shared is None for layer in layers):
        return layers
    tied = tied_layers(layers)
    return without_ties(layers, model, {*tied, *(first.name for first in tied.values())})


def tied_layers(layers: Sequence[MoeLayer]) -> dict[str, MoeLayer]:
    """Layers that share all experts with an earlier one (encoder and decoder of one model): name -> the earlier."""
    first: dict[tuple[int, ...], MoeLayer] = {}
    tied = {}
    for layer in layers:
        key = tuple(id(parameter) for parameter in layer.expert_parameters.values())
        if first.setdefault(key, layer) is not layer:
            tied[layer.name] = first[key]
    return tied
