"""One layer through the steps of a recipe: group, align, merge, route, install, and measure what it did."""

import functools
import time
from typing import Any

import torch
from torch import Tensor

from ..decomposition import DECOMPOSITION
from ..executors.in_memory import Collected
from ..expert_values import PackedExperts
from ..modeling.experts import install_mapped, install_native, replace_experts
from ..modeling.install_forms import install_ragged
from ..observation.beside_experts import BesideExperts
from ..observation.layer_inputs import relative_error, routed_output, targets_of
from ..observation.layer_tokens import LayerTokens, as_float32, original_tokens, tokens_of_result
from ..recipe import Recipe
from ..report_types import factor_sizes
from ..routing import ROUTING
from ..sizes import Sizes, constant_sizes, expert_size, expert_sizes, neuron_size, shared_sizes
from ..types import ExpertGroups, ExpertWeights, LayerReport, LayerStatistics, MoeLayer
from .beside import beside_experts, with_change, write_beside
from .constants import constants_of_layer, without_constants
from .decomposition import decompose
from .duplicates import duplicate_share, worth_collapsing
from .fit import FittedExperts, fit_experts
from .matching import match_layer, trains_router
from .merging import MergedLayer, merge_layer
from .record import record_statistics
from .removal import LayerNeurons
from .router import RouterErrors, cut_router
from .sharing import share_experts


def compress_layer(
    layer: MoeLayer,
    recipe: Recipe,
    collected: Collected,
    num_experts: int,
    protected: Tensor | None = None,
    neurons: LayerNeurons | None = None,
) -> tuple[LayerReport, dict[str, Any], dict[str, Tensor]]:
    """Compress one layer in place; a refit also changes its shared expert, see `layer.beside`.

    Extra memory: the new experts, and the members of one group in float32. A recipe that selects neurons or refits
    also needs all experts in float32, what `collected` kept of the calibration tokens, `KeptFeatures` of these, and
    the sums of `FeatureSums` for the neurons that stay.

    Args:
        layer: As found in the original model.
        recipe: The steps.
        collected: What the calibration forward left of this layer; its held-out sample may be empty.
        num_experts: M.
        protected: Experts that stay as they are, (N,) bool; None for none.
        neurons: Of an allocation that shares neurons among layers; None for what the recipe gives each layer.

    Returns:
        What it did, the layer's entry in the layout of a mapped checkpoint, and what `record_statistics` keeps.
    """
    start = time.perf_counter()
    before = targets_of(collected.held_out.outputs or routed_output(layer, collected.held_out), collected.held_out)
    size, per_neuron = expert_size(layer), neuron_size(layer)
    new_sizes = sizes_after(layer, recipe, num_experts)
    original = functools.cache(lambda: original_tokens(layer, collected, with_targets=recipe.is_fitted_on_tokens))
    merged = merge_layer(layer, recipe, collected.statistics, num_experts, original, protected)
    share = duplicate_share(merged.groups, collected.held_out) if merged.routing.slot_map is not None else None
    layout = layout_of_layer(layer, merged.groups, worth_collapsing(recipe, share))
    constants = constants_of_layer(recipe, collected.statistics, merged.groups)
    if constants is not None:
        layout["num_constants"] = len(constants)
        new_sizes += constant_sizes(layer, len(constants))
    beside = beside_experts(layer, recipe, collected, constants)
    of_original = original() if reads_tokens(recipe) else None  # before the router and the experts become others
    is_cut = is_router_cut(layer, merged) and (reads_tokens(recipe) or recipe.router is not None)
    rows = cut_router(layer, recipe, merged, collected, before) if is_cut else None
    tokens = tokens_of_layer(layer, collected, merged, of_original, constants) if of_original is not None else None
    fitted = fit_and_match(layer, recipe, merged, tokens, collected, beside, neurons) if recipe.is_fitted else None
    if recipe.shares_experts:
        share_experts(layer, recipe, merged, collected.statistics, original, layout)
    else:
        install(layer, recipe, merged, tokens, fitted, layout, is_cut=is_cut)
    changed = write_beside(layer, fitted.beside if fitted is not None else None, constants)
    reroute = merged.routing.rows is not None or trains_router(layer, recipe)
    after = with_change(routed_output(layer, collected.held_out, reroute=reroute), changed, collected.held_out)
    widths = fitted.experts.widths.tolist() if fitted is not None else [layer.intermediate_size] * num_experts
    gone = num_experts * layer.intermediate_size - sum(widths)
    report = LayerReport(
        layer=layer.name,
        num_slots=layer.num_slots,
        num_experts_before=layer.num_experts,
        num_experts_after=num_experts,
        parameters_before=size.parameters * layer.num_experts,
        parameters_after=new_sizes.expert_parameters - per_neuron.parameters * gone,
        bytes_before=size.bytes * layer.num_experts,
        bytes_after=new_sizes.expert_bytes - per_neuron.bytes * gone,
        relative_error=relative_error(before, after),
        duplicate_share=share,
        unused_experts=int((collected.statistics.selection_count == 0).sum()),
        seconds=time.perf_counter() - start,
        group_of_expert=merged.groups.group_of_expert.tolist(),
        dominant_of_group=merged.groups.dominant_of_group.tolist(),
        usage_frequency=collected.statistics.usage_frequency.tolist(),
        widths=widths,
        **guarded_steps(fitted, rows, changed),
        protected_experts=protected.nonzero().flatten().tolist() if protected is not None else [],
        width_before=layer.intermediate_size,
        **factor_sizes(layout),
    )
    return report, layout, record_statistics(layer.name, collected.statistics, merged.similarity)


def guarded_steps(
    fitted: FittedExperts | None, rows: RouterErrors | None, changed: BesideExperts | None
) -> dict[str, float | bool | None]:
    """What held-out tokens said of the refit and of the router's rule, for the report; None: there was none."""
    return {
        "refit_error_before": fitted.error_before_refit if fitted is not None else None,
        "refit_error_after": fitted.error_after_refit if fitted is not None else None,
        "shared_expert_refitted": changed is not None,
        "router_error_before": rows.dominant_rows if rows is not None else None,
        "router_error_after": rows.rule if rows is not None else None,
    }


def layout_of_layer(layer: MoeLayer, groups: ExpertGroups, collapse_duplicates: bool) -> dict[str, Any]:
    """A layer's entry in the layout of a mapped checkpoint, but for what the form of its experts adds."""
    return {
        "num_experts": groups.num_groups,
        "num_slots": layer.num_slots,
        "has_dropped": bool((groups.group_of_expert < 0).any()),
        "collapse_duplicates": collapse_duplicates,
    }


def sizes_after(layer: MoeLayer, recipe: Recipe, num_experts: int) -> Sizes:
    """What the M experts of a layer, as found, add to the sizes of the model if they keep all their neurons."""
    if recipe.shares_experts:
        return shared_sizes(layer, recipe)
    return expert_sizes(layer, num_experts, expert_size(layer, recipe if recipe.decomposes(layer.num_slots) else None))


def neurons_of(layer: MoeLayer, recipe: Recipe, num_experts: int) -> LayerNeurons:
    """What the recipe gives each layer."""
    return LayerNeurons(recipe.neurons_per_layer(layer.num_slots, layer.intermediate_size, num_experts))


def fit_and_match(
    layer: MoeLayer,
    recipe: Recipe,
    merged: MergedLayer,
    tokens: LayerTokens | None,
    collected: Collected,
    beside: BesideExperts | None,
    neurons: LayerNeurons | None,
) -> FittedExperts | None:
    """Select neurons, refit and train, as the recipe says; None where all experts stay as they are."""
    neurons = neurons or neurons_of(layer, recipe, merged.groups.num_groups)
    if is_unchanged(layer, merged, neurons):
        return None
    fitted = fit_layer(layer, recipe, merged, tokens, collected.statistics, beside, neurons)
    return match_layer(layer, recipe, collected, tokens, fitted) if recipe.matching is not None else fitted


def tokens_of_layer(
    layer: MoeLayer, collected: Collected, merged: MergedLayer, original: LayerTokens, constants: Tensor | None
) -> LayerTokens:
    """The kept tokens under the gates that the result will apply, with what its experts should give for them.

    That is what the original experts give, less the constants that dropped slots add.

    In the native layout with fewer experts the router must have been cut.
    """
    num_experts, group_of_expert = merged.groups.num_groups, merged.groups.group_of_expert
    reroute = is_router_cut(layer, merged)
    if reroute:
        assignment = torch.eye(num_experts)
    else:
        assignment = torch.zeros(layer.num_slots, num_experts)
        stays = (group_of_expert >= 0).nonzero().flatten()
        assignment[stays, group_of_expert[stays]] = 1.0
    tokens = tokens_of_result(layer, collected, original, assignment, reroute=reroute)
    if constants is None:
        return tokens
    return without_constants(original, tokens, (group_of_expert < 0).nonzero().flatten(), constants)


def is_router_cut(layer: MoeLayer, merged: MergedLayer) -> bool:
    """Whether the result has fewer router rows."""
    return merged.routing.rows is not None and merged.groups.num_groups < layer.num_slots


def reads_tokens(recipe: Recipe) -> bool:
    """Whether tokens are needed under the gates of the result."""
    return recipe.is_fitted_on_tokens or (
        recipe.decomposition is not None and bool(DECOMPOSITION.needs(recipe.decomposition))
    )


def fit_layer(
    layer: MoeLayer,
    recipe: Recipe,
    merged: MergedLayer,
    tokens: LayerTokens | None,
    statistics: LayerStatistics,
    beside: BesideExperts | None,
    neurons: LayerNeurons,
) -> FittedExperts:
    """Select neurons and refit, as the recipe says; without tokens by statistics alone."""
    experts = merged.unions or as_float32(layer.family.view(layer, merged.parameters))
    supply = {"statistics": lambda: statistics, "experts_kept": lambda: merged.experts_kept}
    how = {"supply": supply, "saliency": neurons.saliency}
    if tokens is None:
        return fit_experts(experts, layer.family.activation(layer), recipe, neurons.number, [], [], **how)
    kept, how["known"], how["beside"] = (tokens.calibration, tokens.held_out), tokens.features, beside
    return fit_experts(experts, tokens.activation, recipe, neurons.number, *kept, **how)


def is_unchanged(layer: MoeLayer, merged: MergedLayer, neurons: LayerNeurons) -> bool:
    """Whether all experts stay as they are, so that there is nothing to fit."""
    num_experts = merged.groups.num_groups
    return num_experts == layer.num_slots and neurons.number == num_experts * layer.intermediate_size


def install(
    layer: MoeLayer,
    recipe: Recipe,
    merged: MergedLayer,
    tokens: LayerTokens | None,
    fitted: FittedExperts | None,
    layout: dict[str, Any],
    *,
    is_cut: bool,
) -> None:
    """Put the result into the model; `layout` gets what the form of the experts adds to it.

    `is_cut` tells that the router has M rows already, and that the module holds M experts.
    """
    routing, parameters = merged.routing, merged.parameters
    if fitted is not None and routing.slot_map is not None and is_ragged(layer, merged, fitted.experts):
        install_ragged(layer, fitted.experts, routing.slot_map, layout)
        return
    if fitted is not None:
        dtype = layer.family.view(layer, parameters).up.dtype
        weights = fitted.experts.to_uniform(int(fitted.experts.widths.max())).tensors()
        stacked = layer.family.unview(layer, ExpertWeights(**{name: t.to(dtype) for name, t in weights.items()}))
        parameters = {name: stacked.get(name, tensor) for name, tensor in parameters.items()}
    if recipe.decomposes(layer.num_slots):
        decompose(layer, recipe, merged, layer.family.view(layer, parameters), tokens, layout)
    elif routing.slot_map is not None:
        install_mapped(layer, parameters, routing.slot_map, layout)
    elif is_cut:
        replace_experts(layer, parameters)
    else:
        install_native(layer, parameters, routing.rows, merged.groups.group_of_expert)


def is_ragged(layer: MoeLayer, merged: MergedLayer, experts: PackedExperts) -> bool:
    """Whether experts are stored as of different widths: unions always are, so that what is planned is what comes."""
    return merged.unions is not None or bool((experts.widths != layer.intermediate_size).any())


def follow(layer: MoeLayer, first: MoeLayer, report: LayerReport, layout: dict[str, Any], recipe: Recipe) -> None:
    """Make of a layer what became of `first`, whose experts it shares; `report` and `layout` are those of `first`."""
    shared = {name: first.experts.get_parameter(name).detach() for name in layer.expert_parameters}
    new = first.family.stack(first, shared)
    groups = ExpertGroups(torch.tensor(report.group_of_expert), torch.tensor(report.dominant_of_group))
    routing = ROUTING[recipe.layout](groups)
    if routing.slot_map is not None:
        install_mapped(layer, new, routing.slot_map, layout)
    else:
        install_native(layer, new, routing.rows, groups.group_of_expert)
