"""Parameters, bytes and FLOPs of what a recipe makes of a model, without building it."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from .auto_candidates import recipe_to_plan
from .decomposition import DECOMPOSITION
from .families import find_layers, tied_layers
from .layouts import budget_of_layer, check_layout, neurons_of_layer, resolve_layers
from .recipe import Recipe
from .shared_base import SHARED_BASE
from .sizes import (
    INDEX_BYTES,
    Sizes,
    constant_sizes,
    expert_size,
    expert_sizes,
    measure,
    neuron_sizes,
    router_sizes,
    shared_sizes,
)
from .solvers.low_rank import DEFAULT_RANK
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


def plan_of_share(model: PreTrainedModel, recipe: Recipe) -> ModelPlan:
    """What `plan` says of a recipe whose `keep` is a number, for a model on any device."""
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
    if recipe.shares_experts:
        return shared_sizes(layer, recipe)
    decomposed_by = recipe if recipe.decomposes(layer.num_slots) else None
    sizes = expert_sizes(layer, num_experts, expert_size(layer, decomposed_by))
    if recipe.constants is not None:
        sizes += constant_sizes(layer, layer.num_slots - num_experts)
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
    is_united = recipe.unites and num_experts < layer.num_slots
    is_ragged = is_united or neurons_of_layer(layer, recipe, num_experts) < full
    offsets = num_experts + 1 if is_ragged else 0
    has_rows = recipe.shares_experts and SHARED_BASE.trait(recipe.shared_base, "shares") == "base"
    if recipe.decomposes(layer.num_slots) or has_rows:  # and of each matrix, where rows or ranks of experts start
        offsets = (3 if layer.format.has_gate else 2) * (num_experts + 1)
    return Sizes(0, 0, 0, (layer.num_slots + layer.num_identity_slots + offsets) * INDEX_BYTES, 0, 0)


def _notes(model: PreTrainedModel, kept: list[MoeLayer], recipe: Recipe, layer_plans: list[LayerPlan]) -> list[str]:
    """What a reader of the numbers must know about them."""
    notes = []
    if recipe.layout == "mapped" and recipe.selection is not None:
        notes.append("Active parameters and FLOPs are averages: experts keep different numbers of neurons.")
    elif recipe.layout == "mapped" and recipe.shared_base is None:
        notes.append(
            "Active parameters and FLOPs are upper bounds: several slots of a token may hold one expert, which is "
            "then computed once."
        )
    if any(layer.is_average for layer in layer_plans):
        what = "neurons" if recipe.allots_neurons else "experts"
        total = sum(layer.experts_after for layer in layer_plans if not layer.excluded)
        if recipe.allots_neurons:
            total = sum(neurons_of_layer(layer, recipe, layer.num_slots) for layer in kept)
        notes.append(
            f"{what.capitalize()} per layer are averages: allocation {recipe.allocation!r} spends {total} {what} on "
            f"{len(kept)} layers after calibration."
        )
        if len({layer.bytes_per_expert for layer in kept}) > 1:
            notes.append("Experts differ in size between layers, so the totals are estimates.")
    if not recipe.is_ranked and any(layer.expert_bytes_after > layer.expert_bytes_before for layer in layer_plans):
        asked = DECOMPOSITION.options(recipe.decomposition) | recipe.decomposition_options
        size = f"rank {asked['rank'] or DEFAULT_RANK}"
        size = size if asked["parameter_ratio"] is None else f"parameter_ratio {asked['parameter_ratio']}"
        notes.append(f"{size} and keep_rows {asked['keep_rows']} store more than the experts they replace.")
    if getattr(model.config, "is_encoder_decoder", False):
        notes.append("Active parameters and FLOPs are those of one source and one target token together.")
    if getattr(model.config, "quantization_config", None) is not None:
        notes.append(f"The checkpoint is quantized; these are the sizes of its weights in {model.dtype}.")
    return notes
