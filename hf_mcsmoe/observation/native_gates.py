"""The gates that a router would give if only some of its rows were there, without changing it."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..families.names import NUM_ROWS_NAMES
from ..modeling.experts import rename_counts, select_rows, slot_axis
from ..modeling.forms.base import meta_copy
from ..modeling.offload import fetched
from ..types import MoeLayer
from .gated_features import dense_gates
from .layer_inputs import LayerInputs, TensorOfBlock, ignore_passive


@torch.no_grad()
def native_gates(
    layer: MoeLayer, inputs: LayerInputs, kept: Tensor, places: Sequence[int] | None = None
) -> list[Tensor]:
    """The weight of each expert for each kept token, (t, N) float32 a batch; 0 for experts that are not in `kept`.

    Args:
        layer: As it was found; it is not changed.
        inputs: With the calls of its router.
        kept: Router rows that stay, (M,) int64 ascending.
        places: The batches to do; None for all.
    """
    places = range(len(inputs.router_calls)) if places is None else places
    passive = torch.arange(layer.num_slots, layer.num_slots + layer.num_passive_rows)
    rows_of_size = {layer.num_slots: kept, layer.num_slots + layer.num_passive_rows: torch.cat([kept, passive])}
    with fetched(layer.router):
        router = cut_router(layer, rows_of_size)
        found = [gates_of_call(layer, router, inputs, place, rows_of_size) for place in places]
    gates = []
    for of_kept in found:
        wide = of_kept.new_zeros(len(of_kept), layer.num_slots)
        gates.append(wide.index_copy_(1, kept.to(wide.device), of_kept))
    return gates


def cut_router(layer: MoeLayer, rows_of_size: dict[int, Tensor]) -> nn.Module:
    """A copy of a layer's router with some of its rows; the tensors that have no rows of experts are shared."""
    router = meta_copy(layer.router)
    for path, tensor in [*layer.router.named_parameters(), *layer.router.named_buffers()]:
        owner_name, _, name = path.rpartition(".")
        owner = router.get_submodule(owner_name)
        if name in owner._parameters:
            owner._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
        else:
            owner._buffers[name] = tensor
    num_slots, num_kept = layer.num_slots, rows_of_size[layer.num_slots].numel()
    for module in router.modules():
        select_rows(module, rows_of_size)
        rename_counts(module, num_slots, num_kept)
        if layer.num_passive_rows:
            with_passive = num_slots + layer.num_passive_rows
            rename_counts(module, with_passive, num_kept + layer.num_passive_rows, NUM_ROWS_NAMES)
    return router


def gates_of_call(
    layer: MoeLayer, router: nn.Module, inputs: LayerInputs, place: int, rows_of_size: dict[int, Tensor]
) -> Tensor:
    """The gates (t, M) that a cut router gives for an earlier call of the original one."""
    kept_args, kept_kwargs = inputs.router_calls[place]
    args, kwargs = inputs.router_call(place, layer.block)
    args = tuple(cut_argument(old, now, rows_of_size) for old, now in zip(kept_args, args, strict=True))
    kwargs = {name: cut_argument(kept_kwargs[name], now, rows_of_size) for name, now in kwargs.items()}
    num_kept = rows_of_size[layer.num_slots].numel()
    index, weights = layer.family.route(dataclasses.replace(layer, router=router), args, kwargs)
    index, weights = ignore_passive(index, weights, num_kept)
    is_beyond = (inputs.experts_inputs[place][2] == 0).all(-1, keepdim=True) & layer.family.has_capacity
    return dense_gates(index, weights.masked_fill(is_beyond, 0), num_kept)


def cut_argument(old: object, now: object, rows_of_size: dict[int, Tensor]) -> object:
    """An argument of the router; of a tensor that the block keeps, such as a correction bias, the rows that stay."""
    if not isinstance(old, TensorOfBlock):
        return now
    for size, rows in rows_of_size.items():
        axis = slot_axis(now, size)
        if axis is not None:
            return now.index_select(axis, rows.to(now.device))
    return now
