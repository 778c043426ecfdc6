"""Which layers a recipe is about, how many experts they keep, and what a model cannot become."""

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from .allocation import ALLOCATION
from .executors.stream_outputs import check_streams
from .families import reason_against, tied_layers
from .families.base import MoeFamily
from .families.residual import check_residual
from .grouping import GROUPING
from .modeling.forms import check_forms
from .modeling.install_forms import check_linear_output
from .modeling.native_config import check_native
from .modeling.native_width import NativeFields, native_fields
from .recipe import Recipe
from .registry import closest
from .router_access import check_router
from .sizes import expert_size, shared_sizes
from .statistics import STATISTICS
from .types import MoeLayer


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
    is_marked = hasattr(getattr(model, "config", None), "merged_sparse_moe")
    # First, because experts that are decomposed or of different widths are no layers that a family knows.
    if is_marked or any(
        layer.num_experts != layer.num_slots or hasattr(layer.experts, "expert_map") for layer in layers
    ):
        raise ValueError(f"{named} is already compressed (mapped layout). Start from the original model instead.")
    reason = reason_against(model) if model is not None and not layers else None
    if reason is not None:
        raise ValueError(f"{named} cannot be compressed: {reason}. Choose another model.")
    if not layers:
        raise ValueError(
            f"{named} has no MoE layer that hf_mcsmoe knows: it is dense, or stores its routed experts in a way "
            "that is not supported. Choose another model."
        )
    tied = tied_layers(layers)
    tensors = [id(p) for layer in layers if layer.name not in tied for p in layer.expert_parameters.values()]
    if len(set(tensors)) < len(tensors):
        raise ValueError(f"{named} ties some matrices of experts, not all. Such a model is not supported.")
    if tied and any(
        step is not None for step in (recipe.selection, recipe.decomposition, recipe.router, recipe.shared_base)
    ):
        raise ValueError(
            f"{named} has layers that share their experts; selection and decomposition, shared parts and router rules "
            "cannot treat them. Use a recipe without these steps."
        )
    kept, excluded = resolve_layers(layers, recipe)
    for layer in kept:
        _check_family(layer, recipe)
        if model is not None and recipe.statistics_with("residual"):
            check_residual(model, layer)
    if model is not None and recipe.targets is not None:
        check_streams(model, kept)
    budgets = budget_of_layer(kept, recipe)
    for layer, budget in zip(kept, budgets, strict=True):
        _check_budget(layer, budget, recipe)
    if recipe.layout == "native":
        check_native(kept, budgets, drops_experts=GROUPING.trait(recipe.grouping, "drops", False))
        if model is not None:
            native_target(model, recipe, kept, excluded)
        if recipe.router is not None:
            _check_routers(kept, recipe.router)
    _check_allocation([layer.num_slots for layer in kept], budgets, recipe)


def _check_allocation(sizes: list[int], budgets: list[int], recipe: Recipe) -> None:
    """The rule knows best what it cannot spend; equal saliencies stand for those that calibration will give."""
    if recipe.allots_neurons:
        return  # any layer can keep its share
    name, check = recipe.allocation, ALLOCATION.trait(recipe.allocation, "check_budget")
    if check is not None:
        check(sizes, budgets, {**ALLOCATION.options(name), **recipe.allocation_options})
        return
    equal = [torch.full((size,), 1 / size) for size in sizes]
    ALLOCATION[name](equal, budgets, **recipe.allocation_options)


def _check_family(layer: MoeLayer, recipe: Recipe) -> None:
    layouts, reason = layer.family.layouts, layer.family.not_native_because
    if recipe.layout not in layouts:
        raise ValueError(
            f"layout {recipe.layout!r} is not possible for {layer.name!r}{f': {reason}' if reason else ''}. "
            f"Use one of {list(layouts)}."
        )
    if recipe.is_fitted or recipe.decomposition is not None or recipe.shares_experts:
        check_forms(layer)
    if recipe.shares_experts:
        check_linear_output(layer)
    if recipe.protect is not None and recipe.layout == "native" and layer.num_router_groups > 1:
        raise ValueError(
            f"protect is {recipe.protect!r}, but in layout 'native' each of the {layer.num_router_groups} groups of "
            f"the router of {layer.name!r} must keep the same number of experts. Use layout='mapped' or protect=None."
        )
    if recipe.constants is not None and layer.family.map_hooks(layer) is not None:
        raise ValueError(
            f"constants is {recipe.constants!r}, but the experts of {layer.name!r} are not called with slots and "
            "weights, so nothing can be added for a dropped slot. Use constants=None."
        )
    _check_running(layer, recipe)


def _check_running(layer: MoeLayer, recipe: Recipe) -> None:
    """Refuse recipes that run the experts of a layer one by one, or again, where that is not possible."""
    runs = [name for name in sorted(recipe.statistics_needed()) if STATISTICS.trait(name, "of") != "slots"]
    if runs and type(layer.family).activation is MoeFamily.activation:
        raise ValueError(
            f"The recipe collects {', '.join(runs)}, for which the experts of {layer.name!r} cannot be run one by "
            f"one: {layer.family.not_formed_because}. Use a recipe that looks at the router only, such as 'frequency'."
        )
    if recipe.needs_inputs and layer.family.no_forms_because(layer):
        raise ValueError(
            f"The recipe runs the experts of {layer.name!r} by their matrices alone, which is not possible: "
            f"{layer.family.no_forms_because(layer)}. Leave the layer out with exclude_layers, or use another recipe."
        )
    if recipe.needs_inputs and getattr(layer.experts, "has_post_expert_norm", False):
        raise ValueError(
            "selection, refit and all that runs experts again need experts whose output is linear in their last "
            f"matrix; those of {layer.name!r} are normalised. Use a recipe without them."
        )


def _check_routers(layers: Sequence[MoeLayer], rule: str) -> None:
    """One probe for each kind of router that the layers have."""
    kinds = {}
    for layer in layers:
        shapes = tuple((name, tuple(t.shape)) for name, t in layer.router.state_dict().items())
        kinds.setdefault((type(layer.router), layer.num_slots, shapes), layer)
    for layer in kinds.values():
        check_router(layer, rule)


def _check_budget(layer: MoeLayer, budget: int, recipe: Recipe) -> None:
    if not 1 <= budget <= layer.num_slots:
        raise ValueError(
            f"num_experts is {budget}, but {layer.name!r} has {layer.num_slots} experts. Ask for 1..{layer.num_slots}."
        )
    check_sizes = GROUPING.trait(recipe.grouping, "check_sizes")
    if check_sizes is not None and recipe.allocation == "uniform":  # others decide after calibration
        check_sizes(layer.num_slots, budget, {**GROUPING.options(recipe.grouping), **recipe.grouping_options})
    if recipe.shares_experts:
        try:
            shared_sizes(layer, recipe)
        except ValueError as error:
            raise ValueError(f"shared_base {recipe.shared_base!r} does not fit {layer.name!r}: {error}") from error
    if recipe.decomposition is not None:
        try:
            expert_size(layer, recipe)
        except ValueError as error:
            raise ValueError(f"decomposition_options do not fit {layer.name!r}: {error}") from error
