"""Putting fewer experts into a layer: the expert map of the mapped layout, the cut router of the native one."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..families.names import NUM_EXPERTS_NAMES, NUM_ROWS_NAMES
from ..types import ExpertWeights, MoeLayer
from .constant_outputs import attach_constants, note_constants
from .forms import ExpertForm
from .offload import execution_device, fetched, replace_tensor


class ExpertMap(nn.Module):
    """Sends router slots to stored experts, before the experts see them.

    It acts in a pre-hook of the experts module, not inside its forward, because expert parallelism replaces
    that forward and calls the original with local ids.

    Args:
        num_slots: N, rows of the router.
        num_experts: M, experts stored.
        has_dropped: Some slots map to -1: they add nothing.
        collapse_duplicates: Compute an expert once per token where several of its slots hold it.
    """

    def __init__(self, num_slots: int, num_experts: int, has_dropped: bool = False, collapse_duplicates: bool = False):
        super().__init__()
        self.num_experts = num_experts
        self.has_dropped = has_dropped
        self.collapse_duplicates = collapse_duplicates
        self.register_buffer("index", torch.arange(num_slots) % num_experts)  # (N,) int64 in [-1, M)

    def forward(self, slots: Tensor, weights: Tensor, can_skip: bool) -> tuple[Tensor, Tensor]:
        """Stored experts and weights of each token.

        Args:
            slots: Router slots, (T, k) int64.
            weights: Their weights, (T, k).
            can_skip: The experts' forward skips index M. Otherwise skipped slots go to expert 0 with weight 0.

        Returns:
            Expert index (T, k) in [0, M] and weights (T, k); a skipped slot has weight 0.
        """
        experts = self.index.to(slots.device)[slots]
        skip = experts < 0 if self.has_dropped else None
        if self.collapse_duplicates and can_skip:
            same = experts[..., :, None] == experts[..., None, :]  # (T, k, k)
            weights = torch.where(same, weights[..., None, :], 0).sum(-1).to(weights.dtype)
            repeated = same.tril(-1).any(-1)
            skip = repeated if skip is None else skip | repeated
        if skip is None:
            return experts, weights
        return experts.masked_fill(skip, self.num_experts if can_skip else 0), weights.masked_fill(skip, 0)


def map_slots(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of an experts module (hidden_states, top_k_index, top_k_weights): slots to experts."""
    names = list(kwargs)
    given = [*args, *kwargs.values()]
    note_constants(module, given[1], given[2])
    given[1], given[2] = module.expert_map(given[1], given[2], can_skip_experts(module))
    return tuple(given[: len(args)]), dict(zip(names, given[len(args) :], strict=True))


def can_skip_experts(module: nn.Module) -> bool:
    """Whether index M is skipped: by our own forms, and by transformers' grouped one with its sentinel masks on.

    Not under real expert parallelism, which uses that index itself; its modules hold fewer experts than M.
    """
    return isinstance(module, ExpertForm) or (
        getattr(module, "_is_expert_parallel", False)
        and module.num_experts == module.expert_map.num_experts
        and module.config._experts_implementation == "grouped_mm"
    )


def attach_expert_map(layer: MoeLayer, layout: dict[str, Any], index: Tensor | None = None) -> None:
    """Give an experts module that already holds M experts its map and the hook that applies it.

    Args:
        layer: As found in the original model; the tensors of its experts module have M entries now.
        layout: `num_experts`, `has_dropped` and `collapse_duplicates` of the layer, and `num_constants` where
            dropped slots add constants, see `attach_constants`.
        index: The map, (N,) int64; None leaves a placeholder for a checkpoint to fill.
    """
    experts, num_experts, num_identity = layer.experts, layout["num_experts"], layer.num_identity_slots
    num_slots = layer.num_slots + num_identity
    expert_map = ExpertMap(num_slots, num_experts, layout["has_dropped"], layout["collapse_duplicates"])
    if index is not None:
        # Identity experts come after the stored ones, as they did before.
        expert_map.index.copy_(torch.cat([index, torch.arange(num_identity) + num_experts]))
    tensor = next(experts.parameters(), None)
    device = torch.device("meta") if tensor is not None and tensor.is_meta else None
    hooked = next((module for module in experts.modules() if hasattr(module, "_hf_hook")), None)
    device = execution_device(hooked or experts) if device is None or hooked is not None else device
    experts.expert_map = expert_map.to(device)
    attach_constants(experts, layout, layer.hidden_size)
    rename_counts(experts, layer.num_slots, num_experts)
    rename_counts(experts, num_slots, num_experts + num_identity, NUM_ROWS_NAMES)
    if (layout["has_dropped"] or layout["collapse_duplicates"]) and hasattr(experts, "_is_expert_parallel"):
        experts._is_expert_parallel = True  # makes the grouped implementation skip index M
    register_map(layer)


def register_map(layer: MoeLayer) -> None:
    """Let the map of a layer act in every forward from now on, in the way of its family."""
    hooks = layer.family.map_hooks(layer)
    if hooks is None:
        layer.experts.register_forward_pre_hook(map_slots, with_kwargs=True)
        return
    expert_map = layer.experts.expert_map
    if hooks.before is not None:
        before = functools.partial(map_arguments, expert_map, hooks.before)
        hooks.module.register_forward_pre_hook(before, with_kwargs=True)
    if hooks.after is not None:
        hooks.module.register_forward_hook(functools.partial(map_output, expert_map, hooks.after))


def map_arguments(
    expert_map: ExpertMap,
    before: Callable,
    module: nn.Module,  # noqa: ARG001
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: the arguments that `before` makes of a call's own."""
    return before(expert_map, (*args, *kwargs.values())), {}


def map_output(expert_map: ExpertMap, after: Callable, module: nn.Module, args: tuple, output: Any) -> Any:  # noqa: ARG001
    """Forward hook: what `after` makes of an output."""
    return after(expert_map, output)


def replace_experts(layer: MoeLayer, stacked: dict[str, Tensor]) -> None:
    """Put M experts, stacked as the layer's family stacks them, in the place of the N that are there."""
    parameters = layer.family.unstack(layer, stacked)
    for name in {name.partition(".")[0] for name in layer.expert_parameters if name not in parameters}:
        delattr(layer.experts, name)  # the module of an expert that is no more
        # transformers' initialization of the block would look for it: it counts experts by the configuration's N.
        layer.block._is_hf_initialized = True
    num_experts = min(len(tensor) for tensor in stacked.values())
    for path, value in parameters.items():
        owner_name, _, name = path.rpartition(".")
        owner = layer.experts.get_submodule(owner_name)
        replace_tensor(owner, name, value)
        if isinstance(owner, nn.Linear) and name == "weight":
            owner.out_features, owner.in_features = value.shape
        if owner is not layer.experts:
            rename_counts(owner, layer.num_slots, num_experts)


def shrink_experts(layer: MoeLayer, num_experts: int, width: int | None = None) -> None:
    """Cut a freshly built layer to its first M experts, on any device (meta included).

    Args:
        layer: With N experts.
        num_experts: M.
        width: Neurons of each expert, which may be more than there are; None keeps their number.
    """
    replace_experts(layer, first_experts(layer, num_experts, width))


def first_experts(layer: MoeLayer, num_experts: int, width: int | None = None) -> dict[str, Tensor]:
    """Copies of the first M experts of a layer, stacked; arguments as for `shrink_experts`."""
    tails = layer.passive_expert_rows
    kept = {name: p[:num_experts] for name, p in layer.family.stack(layer, layer.expert_parameters).items()}
    kept = {name: torch.cat([p, tails[name]]) if name in tails else p.clone() for name, p in kept.items()}
    if width is not None:
        kept = layer.family.unview(layer, repeat_neurons(layer.family.view(layer, kept), width))
    return kept


def repeat_neurons(weights: ExpertWeights, width: int) -> ExpertWeights:
    """Experts with `width` neurons: their first ones, over and over where there are too few."""
    neurons = torch.arange(width, device=weights.up.device) % weights.width
    axes = {name: 2 if name == "down" else 1 for name in weights.tensors() if name != "down_bias"}
    fields = {name: getattr(weights, name).index_select(axis, neurons) for name, axis in axes.items()}
    return ExpertWeights(down_bias=weights.down_bias, **fields)


def install_mapped(layer: MoeLayer, parameters: dict[str, Tensor], slot_map: Tensor, layout: dict[str, Any]) -> None:
    """Replace a layer's experts by M merged ones behind a map; in place.

    Args:
        layer: The layer as found in the original model.
        parameters: New experts as the family stacks them, dimension 0 = M.
        slot_map: (N,) int64 in [-1, M).
        layout: See `attach_expert_map`.
    """
    replace_experts(layer, parameters)
    attach_expert_map(layer, layout, slot_map)


def install_native(layer: MoeLayer, parameters: dict[str, Tensor], rows: Tensor, group_of_expert: Tensor) -> None:
    """Replace a layer's experts by M and cut its router; in place.

    Args:
        layer: The layer as found in the original model.
        parameters: New experts as the family stacks them, dimension 0 = M.
        rows: The router rows that stay, (M,) int64 ascending.
        group_of_expert: (N,) int64 in [0, M) for routers that look experts up; others do not read it.

    Raises:
        ValueError: A table of the router names an expert that was dropped.
    """
    num_slots, num_experts, passive = layer.num_slots, rows.numel(), layer.num_passive_rows
    for module, name in layer.family.expert_tables(layer):
        with fetched(module):
            table = group_of_expert.to(getattr(module, name).device)[getattr(module, name).long()]
        if (table < 0).any():
            raise ValueError(f"{name} of {layer.router_name!r} names experts that were dropped. Use layout='mapped'.")
        replace_tensor(module, name, table.to(getattr(module, name).dtype))
    replace_experts(layer, parameters)
    with_passive = torch.cat([rows, torch.arange(num_slots, num_slots + passive)])
    for module in [*layer.router.modules(), layer.block]:
        select_rows(module, {num_slots: rows, num_slots + passive: with_passive})
    for module in [layer.experts, layer.block, *layer.router.modules()]:
        rename_counts(module, num_slots, num_experts)
        if passive:
            rename_counts(module, num_slots + passive, num_experts + passive, NUM_ROWS_NAMES)


def select_rows(module: nn.Module, rows_of_size: dict[int, Tensor]) -> None:
    """Keep rows of every direct tensor of `module` with one entry per slot: (N, ...) or (1, N).

    Args:
        module: The router, a part of it, or the block around it.
        rows_of_size: Which rows stay in a tensor with this many.
    """
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        for num_slots, rows in rows_of_size.items():
            axis = slot_axis(tensor, num_slots)
            if axis is None:
                continue
            with fetched(module):
                current = getattr(module, name).detach()
                kept = current.index_select(axis, rows.to(current.device))
            replace_tensor(module, name, kept)
            break
    if isinstance(module, nn.Linear) and module.out_features in rows_of_size:
        module.out_features = rows_of_size[module.out_features].numel()


def slot_axis(tensor: Tensor, num_slots: int) -> int | None:
    """The axis of a router tensor that counts slots, None if it has none."""
    if tensor.dim() >= 1 and tensor.shape[0] == num_slots:
        return 0
    if tensor.dim() == 2 and tuple(tensor.shape) == (1, num_slots):
        return 1
    return None


def rename_counts(owner: Any, num_slots: int, num_experts: int, names: tuple[str, ...] = NUM_EXPERTS_NAMES) -> None:
    """Set every expert count of a module or configuration that equals N to M."""
    for name in names:
        try:
            value = getattr(owner, name, None)
        except RuntimeError:
            continue  # a configuration with per-layer values of this name
        if isinstance(value, int) and value == num_slots:
            setattr(owner, name, num_experts)


def is_same_layer(name: str, other: str) -> bool:
    """Whether two paths name one layer: a model with another head, or none, has a longer or shorter prefix."""
    return name == other or name.endswith(f".{other}") or other.endswith(f".{name}")
