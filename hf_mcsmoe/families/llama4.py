"""Llama 4: every expert gets every token, multiplied by its score before the experts; T tokens, N slots, M experts."""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..types import ExpertFormat, MoeLayer
from .base import FAMILIES, MapHooks
from .fused import FusedExperts


class DenseExperts(FusedExperts):
    """Fused, transposed experts with one argument: N blocks of T rows, zero where the router did not choose."""

    not_formed_because = "Llama 4 multiplies the input of its experts by their scores"

    observes_router = True

    def match(self, name: str, module: nn.Module) -> bool:  # noqa: ARG002
        parameters = dict(module.named_parameters(recurse=False))
        if not all(key in parameters and parameters[key].dim() == 3 for key in ("gate_up_proj", "down_proj")):
            return False
        return len(inspect.signature(type(module).forward).parameters) - 1 == 1

    def describe(self, name: str, module: nn.Module, modules: dict[str, nn.Module], config: Any) -> MoeLayer | None:
        num_experts, width, hidden_size = module.down_proj.shape
        return self.layer_around(
            name,
            modules,
            config,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=width,
            expert_format=ExpertFormat(is_transposed=True),
        )

    def routed_by_router(self, layer: MoeLayer, args: tuple, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        weights, index = output[0].topk(layer.top_k, dim=1)  # the scores (T, N) of what was not chosen are 0
        return args[0], index, weights

    def run_experts(self, layer: MoeLayer, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        expert_map = getattr(layer.experts, "expert_map", None)
        num_slots = expert_map.index.numel() if expert_map is not None else self.stored_experts(layer)
        scores = weights.new_zeros(len(hidden_states), num_slots).scatter(1, index, weights)
        blocks = hidden_states[None] * scores.T[:, :, None]  # (N, T, D)
        return layer.experts(blocks.flatten(0, 1)).view_as(blocks).sum(0)

    def map_hooks(self, layer: MoeLayer) -> MapHooks:
        # Scores act before the non-linearity, so what one token sends to a merged expert must not be added up.
        places = min(layer.top_k, layer.num_slots - self.stored_experts(layer) + 1)
        return MapHooks(
            layer.experts,
            before=functools.partial(pack_slots, places=places),
            after=functools.partial(unpack_slots, places=places),
        )

    def logits(self, output: Any) -> Tensor:
        return output[1]

    def route(self, layer: MoeLayer, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.routed_by_router(layer, args, layer.router(*args, **kwargs))[1:]


def pack_slots(expert_map: nn.Module, args: tuple, places: int) -> tuple:
    """N blocks of T rows -> M * places blocks: what a token sends to one expert goes to that expert's next free place.

    Args:
        expert_map: Sends slots to experts; the rows of dropped slots are left out.
        args: The rows (N T, D).
        places: Most slots of one token that one expert can get: k, or fewer if no group is that large. So the
            experts compute on M k T rows at most instead of N T.
    """
    (rows,) = args
    index = expert_map.index.to(rows.device)
    blocks = rows.view(index.numel(), -1, rows.shape[-1])  # (N, T, D)
    place = torch.zeros(blocks.shape[:2], dtype=torch.int64, device=rows.device)
    if places > 1:
        is_used = (blocks != 0).any(-1)
        place += (earlier_slots(index).float() @ is_used.float()).long()
        place.clamp_(max=places - 1)  # rows that are not used are zero, wherever they go
    target = index.clamp(min=0)[:, None] * places + place  # (N, T)
    kept = blocks * (index >= 0)[:, None, None]
    packed = rows.new_zeros(expert_map.num_experts * places, *blocks.shape[1:])
    return (packed.scatter_add(0, target[:, :, None].expand_as(kept), kept).flatten(0, 1),)


def unpack_slots(expert_map: nn.Module, output: Tensor, places: int) -> Tensor:
    """M * places blocks of T rows -> N blocks, for the sum over slots that follows.

    The p-th place of an expert goes to the p-th of its slots, the other slots are zero: the sum over a token's
    slots does not depend on which of an expert's slots has which output.
    """
    index = expert_map.index.to(output.device)
    blocks = output.view(expert_map.num_experts * places, -1, output.shape[-1])
    place = earlier_slots(index).sum(1)
    source = index.clamp(min=0) * places + place.clamp(max=places - 1)
    is_filled = (index >= 0) & (place < places)
    return torch.where(is_filled[:, None, None], blocks[source], 0).flatten(0, 1)


def earlier_slots(index: Tensor) -> Tensor:
    """(N, N) bool: slot j comes before slot i and has the same expert."""
    return (index[:, None] == index[None, :]).tril(-1)


FAMILIES.append(DenseExperts())
