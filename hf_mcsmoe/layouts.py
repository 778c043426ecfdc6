"""What the result is: parameters, bytes and FLOPs of a recipe without building it, and what it cannot be."""

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .allocation import ALLOCATION
from .auto_candidates import recipe_to_plan
from .families import find_layers, reason_against, tied_layers
from .loading import empty_model, read_config
from .modeling.forms import check_forms
from .modeling.native_config import check_native
from .modeling.native_width import NativeFields, native_fields
from .recipe import Recipe
from .registry import closest
from .sizes import INDEX_BYTES, Sizes, expert_size, expert_sizes, measure, neuron_sizes, router_sizes
from .types import MoeLayer


@dataclass(frozen=True)
class LayerPlan:
    """What a recipe makes of the routed experts of one layer; its router and expert map are not in here."""

    name: str
    num_slots: int
    experts_before: int
    experts_after: int
    expert_parameters_before: int
    expert_parameters_after: int
    expert_bytes_before: int
    expert_bytes_after: int
    excluded: bool  # left as it is
    is_average: bool  # the allocation shares one budget among layers; each one's part is known after calibration


@dataclass(frozen=True)
class ModelPlan:
    """What a recipe makes of a model. For the meaning of each size see `Sizes`."""

    layers: list[LayerPlan]
    layout: str
    total_parameters_before: int
    total_parameters_after: int
    active_parameters_before: int
    active_parameters_after: int
    expert_parameters_before: int
    expert_parameters_after: int
    total_bytes_before: int
    total_bytes_after: int
    expert_bytes_before: int
    expert_bytes_after: int
    flops_per_token_before: int
    flops_per_token_after: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return asdict(self)


def resolve_layers(layers: Sequence[MoeLayer], recipe: Recipe) -> tuple[list[MoeLayer], list[MoeLayer]]:
    """(layers to compress, excluded layers), both in the order of the model.

    Layers that share their experts with an earlier one are in neither: what becomes of that becomes of them.

    Raises:
        ValueError: An entry of `exclude_layers` matches no layer, or all layers are excluded.
        TypeError: An entry is neither a position nor a pattern.
    """
    names = [layer.name for layer in layers]
    excluded: set[int] = set()
    for entry in recipe.exclude_layers:
        if isinstance(entry, bool) or not isinstance(entry, int | str):
            raise TypeError(
                f"exclude_layers has {entry!r} of type {type(entry).__name__}. Give positions (int) or patterns (str)."
            )
        if isinstance(entry, int):
            if not -len(names) <= entry < len(names):
                raise ValueError(
                    f"exclude_layers has {entry}, but the model has {len(names)} MoE layers: positions "
                    f"{-len(names)}..{len(names) - 1}. Dense layers do not count."
                )
            excluded.add(entry % len(names))
            continue
        matches = [position for position, name in enumerate(names) if fnmatch.fnmatchcase(name, entry)]
        if not matches:
            raise ValueError(
                f"exclude_layers has {entry!r}, which matches none of the {len(names)} MoE layers, from {names[0]!r} "
                f"to {names[-1]!r}.{closest(entry, names)}"
            )
        excluded.update(matches)
    if names and len(excluded) == len(names):
        raise ValueError(
            f"exclude_layers {list(recipe.exclude_layers)} leaves none of the {len(names)} MoE layers to compress. "
            "Exclude fewer."
        )
    tied = tied_layers(layers)
    kept = [layer for place, layer in enumerate(layers) if place not in excluded and layer.name not in tied]
    return kept, [layer for place, layer in enumerate(layers) if place in excluded and layer.name not in tied]


def budget_of_layer(layers: Sequence[MoeLayer], recipe: Recipe) -> list[int]:
    """Experts that each layer keeps on average; `layers` are those that are compressed."""
    return [recipe.experts_per_layer(layer.num_slots) for layer in layers]


def native_target(
    model: nn.Module, recipe: Recipe, kept: Sequence[MoeLayer], excluded: Sequence[MoeLayer]
) -> NativeFields:
    """What the configuration must say differently for the native result of a recipe.

    Raises:
        ValueError: It cannot say it.
    """
    num_experts = budget_of_layer(kept, recipe)[0]
    width = neurons_of_layer(kept[0], recipe, num_experts) // num_experts
    return native_fields(model, kept, excluded, num_experts, width)


def neurons_of_layer(layer: MoeLayer, recipe: Recipe, num_experts: int) -> int:
    """Neurons that a compressed layer keeps in its M experts together."""
    return recipe.neurons_per_layer(layer.num_slots, layer.intermediate_size, num_experts)


def check_layout(layers: Sequence[MoeLayer], recipe: Recipe, *, model: nn.Module | None = None) -> None:
    """Refuse what a recipe cannot make of a model, before any work.

    Args:
        layers: All MoE layers of the model.
        recipe: What is asked.
        model: The model the layers belong to, for its name and configuration.

    Raises:
        ValueError: No MoE layer, an already compressed model, a layout that the family has not, or a budget that
            the layers, the router or the allocation cannot have. The message says what is allowed.
        TypeError: An entry of `exclude_layers` is of a wrong type.
    """
    named = "The model" if model is None else type(model).__name__
    # Experts of other forms than dense are not found as layers, so what is marked must be asked first.
    is_marked = hasattr(getattr(model, "config", None), "merged_sparse_moe")
    reason = reason_against(model) if model is not None and not layers and not is_marked else None
    if reason is not None:
        raise ValueError(f"{named} cannot be compressed: {reason}. Choose another model.")
    if not layers and not is_marked:
        raise ValueError(
            f"{named} has no MoE layer that hf_mcsmoe knows: it is dense, or stores its routed experts in a way "
            "that is not supported. Choose another model."
        )
    if is_marked or any(
        layer.num_experts != layer.num_slots or hasattr(layer.experts, "expert_map") for layer in layers
    ):
        raise ValueError(f"{named} is already compressed (mapped layout). Start from the original model instead.")
    tied = tied_layers(layers)
    tensors = [id(p) for layer in layers if layer.name not in tied for p in layer.expert_parameters.values()]
    if len(set(tensors)) < len(tensors):
        raise ValueError(f"{named} ties some matrices of experts, not all. Such a model is not supported.")
    if tied and (recipe.selection is not None or recipe.decomposition is not None):
        raise ValueError(
            f"{named} has layers that share their experts; selection and decomposition cannot treat them. "
            "Use a recipe without these steps."
        )
    kept, excluded = resolve_layers(layers, recipe)
    for layer in kept:
        _check_family(layer, recipe)
    budgets = budget_of_layer(kept, recipe)
    for layer, budget in zip(kept, budgets, strict=True):
        _check_budget(layer, budget, recipe)
    if recipe.layout == "native":
        check_native(kept, budgets, recipe)
        if model is not None:
            native_target(model, recipe, kept, excluded)
    # The rule knows best what it cannot spend; equal saliencies stand for those that calibration will give.
    equal = [torch.full((layer.num_slots,), 1 / layer.num_slots) for layer in kept]
    ALLOCATION[recipe.allocation](equal, budgets, **recipe.allocation_options)


def _check_family(layer: MoeLayer, recipe: Recipe) -> None:
    layouts, reason = layer.family.layouts, layer.family.not_native_because
    if recipe.layout not in layouts:
        raise ValueError(
            f"layout {recipe.layout!r} is not possible for {layer.name!r}{f': {reason}' if reason else ''}. "
            f"Use one of {list(layouts)}."
        )
    if recipe.is_fitted or recipe.decomposition is not None:
        check_forms(layer)
    if recipe.is_fitted and getattr(layer.experts, "has_post_expert_norm", False):
        raise ValueError(
            f"selection and refit need experts whose output is linear in their last matrix; those of {layer.name!r} "
            "are normalised. Use a recipe without them."
        )


def _check_budget(layer: MoeLayer, budget: int, recipe: Recipe) -> None:
    if not 1 <= budget <= layer.num_slots:
        raise ValueError(
            f"num_experts is {budget}, but {layer.name!r} has {layer.num_slots} experts. Ask for 1..{layer.num_slots}."
        )
    if recipe.decomposition is not None:
        try:
            expert_size(layer, recipe)
        except ValueError as error:
            raise ValueError(f"decomposition_options do not fit {layer.name!r}: {error}") from error


def plan(
    model: PreTrainedModel | PreTrainedConfig | str | os.PathLike, recipe: Recipe, *, trust_remote_code: bool = False
) -> ModelPlan:
    """What a recipe makes of a model, without weights and without running anything.

    Bytes are those of the tensors that the checkpoint will hold, in the dtype that the model has or that its
    configuration says. Mapped layout: M experts a layer, and an int64 map with an entry per slot. Native layout: M
    experts and M router rows. What `Sizes` says about decomposed experts is in `expert_size`.

    Args:
        model: A model on any device, a configuration, a folder or a Hub id.
        recipe: What is asked. For "auto" the sizes are those of its first candidate that the model can have; all
            have the same budget.
        trust_remote_code: Run the model's own Python file, if it has one.

    Raises:
        FileNotFoundError: No such model.
        ValueError: The recipe cannot be planned for this model, see `check_layout`.
    """
    if not isinstance(model, PreTrainedModel):
        config = read_config(model, trust_remote_code=trust_remote_code)
        model = empty_model(config, trust_remote_code=trust_remote_code)
    layers = find_layers(model)
    recipe = recipe_to_plan(recipe, lambda candidate: check_layout(layers, candidate, model=model))
    kept, _ = resolve_layers(layers, recipe)
    budgets = dict(zip((layer.name for layer in kept), budget_of_layer(kept, recipe), strict=True))
    before = after = measure(model, layers)
    layer_plans = []
    tied = tied_layers(layers)
    for layer in layers:
        if layer.name in tied:
            after += _tied_change(layer, budgets.get(tied[layer.name].name), recipe)
            continue
        old = expert_sizes(layer, layer.num_experts, expert_size(layer))
        num_experts = budgets.get(layer.name, layer.num_experts)
        new = old if layer.name not in budgets else _layer_after(layer, num_experts, recipe)
        after = after - old + new
        if layer.name in budgets:
            after += _routing_change(layer, num_experts, recipe)
        is_average = layer.name in budgets and recipe.allocation != "uniform"
        layer_plans.append(_layer_plan(layer, num_experts, old, new, layer.name not in budgets, is_average))
    sizes = {f"{name}_before": value for name, value in asdict(before).items()}
    sizes |= {f"{name}_after": value for name, value in asdict(after).items()}
    notes = _notes(model, kept, recipe, layer_plans)
    return ModelPlan(layers=layer_plans, layout=recipe.layout, notes=notes, **sizes)


def _layer_plan(
    layer: MoeLayer, num_experts: int, old: Sizes, new: Sizes, excluded: bool, is_average: bool
) -> LayerPlan:
    return LayerPlan(
        name=layer.name,
        num_slots=layer.num_slots,
        experts_before=layer.num_experts,
        experts_after=num_experts,
        expert_parameters_before=old.expert_parameters,
        expert_parameters_after=new.expert_parameters,
        expert_bytes_before=old.expert_bytes,
        expert_bytes_after=new.expert_bytes,
        excluded=excluded,
        is_average=is_average,
    )


def _layer_after(layer: MoeLayer, num_experts: int, recipe: Recipe) -> Sizes:
    decomposed_by = recipe if recipe.decomposition is not None else None
    sizes = expert_sizes(layer, num_experts, expert_size(layer, decomposed_by))
    gone = num_experts * layer.intermediate_size - neurons_of_layer(layer, recipe, num_experts)
    return sizes - neuron_sizes(layer, num_experts, gone) if gone else sizes


def _tied_change(layer: MoeLayer, num_experts: int | None, recipe: Recipe) -> Sizes:
    """What changes in a layer that shares its experts: what a token uses, and the map of its own."""
    if num_experts is None:
        return Sizes(0, 0, 0, 0, 0, 0)
    old, new = expert_sizes(layer, layer.num_experts, expert_size(layer)), _layer_after(layer, num_experts, recipe)
    active, flops = new.active_parameters - old.active_parameters, new.flops_per_token - old.flops_per_token
    change = Sizes(0, active, 0, 0, 0, flops)
    return change if recipe.layout == "native" else change + _routing_change(layer, num_experts, recipe)


def _routing_change(layer: MoeLayer, num_experts: int, recipe: Recipe) -> Sizes:
    if recipe.layout == "native":
        return router_sizes(layer, num_experts) - router_sizes(layer, layer.num_slots)
    # A ragged layer also stores where its experts start.
    full = num_experts * layer.intermediate_size
    offsets = num_experts + 1 if neurons_of_layer(layer, recipe, num_experts) < full else 0
    if recipe.decomposition is not None:  # and of each matrix, where the rows of experts start
        offsets = (3 if layer.format.has_gate else 2) * (num_experts + 1)
    return Sizes(0, 0, 0, (layer.num_slots + layer.num_identity_slots + offsets) * INDEX_BYTES, 0, 0)


def _notes(model: PreTrainedModel, kept: list[MoeLayer], recipe: Recipe, layer_plans: list[LayerPlan]) -> list[str]:
    """What a reader of the numbers must know about them."""
    notes = []
    if recipe.layout == "mapped" and recipe.selection is not None:
        notes.append("Active parameters and FLOPs are averages: experts keep different numbers of neurons.")
    elif recipe.layout == "mapped":
        notes.append(
            "Active parameters and FLOPs are upper bounds: several slots of a token may hold one expert, which is "
            "then computed once."
        )
    if any(layer.is_average for layer in layer_plans):
        total = sum(layer.experts_after for layer in layer_plans if not layer.excluded)
        notes.append(
            f"Experts per layer are averages: allocation {recipe.allocation!r} spends {total} experts on {len(kept)} "
            "layers after calibration."
        )
        if len({layer.bytes_per_expert for layer in kept}) > 1:
            notes.append("Experts differ in size between layers, so the totals are estimates.")
    if any(layer.expert_bytes_after > layer.expert_bytes_before for layer in layer_plans):
        notes.append(f"{recipe.decomposition_options} store more than the experts they replace.")
    if getattr(model.config, "is_encoder_decoder", False):
        notes.append("Active parameters and FLOPs are those of one source and one target token together.")
    if getattr(model.config, "quantization_config", None) is not None:
        notes.append(f"The checkpoint is quantized; these are the sizes of its weights in {model.dtype}.")
    return notes
