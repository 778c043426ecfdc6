"""One layer through the steps of a recipe: group, align, merge, route, install, and measure what it did."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .alignment import ALIGNMENT
from .executors.in_memory import Collected
from .expert_values import PackedExperts
from .grouping import GROUPING
from .layer_fit import FittedExperts, fit_experts, original_output, routed_tokens
from .layer_inputs import LayerInputs, relative_error, routed_output
from .merging import MERGING
from .modeling.experts import install_mapped, install_native, replace_experts
from .modeling.install_forms import install_ragged
from .modeling.offload import fetched
from .recipe import Recipe
from .routing import ROUTING
from .saliency import SALIENCY
from .similarity import SIMILARITY
from .sizes import expert_size, neuron_size
from .types import ExpertGroups, ExpertWeights, LayerReport, LayerStatistics, MoeLayer, Routing, permute

# Share of duplicate slots from which computing them once is faster (examples/benchmarks/collapse_duplicates.py).
WORTH_COLLAPSING = 0.1


def compress_layer(
    layer: MoeLayer, recipe: Recipe, collected: Collected, num_experts: int
) -> tuple[LayerReport, dict[str, Any]]:
    """Compress one layer in place. Extra memory: the new experts, and the members of one group in float32.

    A recipe that selects neurons or refits also needs all experts in float32, what `collected` kept of the calibration
    tokens, and the sums of `FeatureSums` for the neurons that stay.

    Args:
        layer: As found in the original model.
        recipe: The steps.
        collected: What the calibration forward left of this layer; its held-out sample may be empty.
        num_experts: M.

    Returns:
        What it did, and the layer's entry in the layout of a mapped checkpoint.
    """
    start = time.perf_counter()
    before = routed_output(layer, collected.held_out)
    size, per_neuron = expert_size(layer), neuron_size(layer)
    merged = merge_layer(layer, recipe, collected.statistics, num_experts)
    share = duplicate_share(merged.groups, collected.held_out) if merged.routing.slot_map is not None else None
    layout = {
        "num_experts": num_experts,
        "num_slots": layer.num_slots,
        "has_dropped": bool((merged.groups.group_of_expert < 0).any()),
        "collapse_duplicates": worth_collapsing(recipe, share),
    }
    fitted = fit_layer(layer, recipe, collected, merged) if recipe.is_fitted else None
    install(layer, merged, fitted, layout)
    after = routed_output(layer, collected.held_out, reroute=merged.routing.rows is not None)
    widths = fitted.experts.widths.tolist() if fitted is not None else [layer.intermediate_size] * num_experts
    gone = num_experts * layer.intermediate_size - sum(widths)
    report = LayerReport(
        layer=layer.name,
        num_slots=layer.num_slots,
        num_experts_before=layer.num_experts,
        num_experts_after=num_experts,
        parameters_before=size.parameters * layer.num_experts,
        parameters_after=size.parameters * num_experts - per_neuron.parameters * gone,
        bytes_before=size.bytes * layer.num_experts,
        bytes_after=size.bytes * num_experts - per_neuron.bytes * gone,
        relative_error=relative_error(before, after),
        duplicate_share=share,
        unused_experts=int((collected.statistics.selection_count == 0).sum()),
        seconds=time.perf_counter() - start,
        group_of_expert=merged.groups.group_of_expert.tolist(),
        dominant_of_group=merged.groups.dominant_of_group.tolist(),
        usage_frequency=collected.statistics.usage_frequency.tolist(),
        widths=widths,
        refit_error_before=fitted.error_before_refit if fitted is not None else None,
        refit_error_after=fitted.error_after_refit if fitted is not None else None,
    )
    return report, layout


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """What grouping and merging made of a layer, before it is put into the model."""

    groups: ExpertGroups
    routing: Routing
    parameters: dict[str, Tensor]  # M experts as the family stacks them


def merge_layer(layer: MoeLayer, recipe: Recipe, statistics: LayerStatistics, num_experts: int) -> MergedLayer:
    """Group and merge the experts of a layer, which is left as it is."""
    with fetched(layer.experts):
        old = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
        weights = layer.family.view(layer, old)
        groups = group_experts(layer, recipe, statistics, weights, num_experts)
        new = {name: p.new_empty((num_experts, *p.shape[1:])) for name, p in old.items()}
        importance = SALIENCY[recipe.importance](statistics, weights, **recipe.importance_options)
        merge_groups(weights, groups, recipe, importance, into=layer.family.view(layer, new))
        for name, rows in layer.passive_expert_rows.items():
            new[name] = torch.cat([new[name], rows.detach()])
    return MergedLayer(groups, ROUTING[recipe.layout](groups), new)


def fit_layer(layer: MoeLayer, recipe: Recipe, collected: Collected, merged: MergedLayer) -> FittedExperts:
    """Select neurons and refit, under the gates that the result will apply.

    In the native layout with fewer experts the merged ones are installed first: the fit must see the cut router.
    """
    with fetched(layer.experts):
        stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
        original = as_float32(layer.family.view(layer, stacked))
        activation = layer.family.activation(layer)
        targets = [original_output(original, activation, kept) for kept in (collected.calibration, collected.held_out)]
    del original, stacked
    num_experts, routing = merged.groups.num_groups, merged.routing
    reroute = routing.rows is not None and num_experts < layer.num_slots
    if reroute:
        install_native(layer, merged.parameters, routing.rows, merged.groups.group_of_expert)
        assignment = torch.eye(num_experts)
    else:
        assignment = torch.zeros(layer.num_slots, num_experts)
        kept = (merged.groups.group_of_expert >= 0).nonzero().flatten()
        assignment[kept, merged.groups.group_of_expert[kept]] = 1.0
    tokens, held_out = (
        routed_tokens(layer, kept, assignment, output, reroute=reroute)
        for kept, output in zip((collected.calibration, collected.held_out), targets, strict=True)
    )
    experts = as_float32(layer.family.view(layer, merged.parameters))
    budget = recipe.neurons_per_layer(layer.num_slots, layer.intermediate_size, num_experts)
    return fit_experts(experts, activation, recipe, budget, tokens, held_out)


def as_float32(weights: ExpertWeights) -> PackedExperts:
    """All neurons of experts of one width, in float32."""
    return PackedExperts.from_dense(ExpertWeights(**{name: t.float() for name, t in weights.tensors().items()}))


def install(layer: MoeLayer, merged: MergedLayer, fitted: FittedExperts | None, layout: dict[str, Any]) -> None:
    """Put the result into the model; `layout` gets what the form of the experts adds to it."""
    routing, parameters = merged.routing, merged.parameters
    if fitted is not None and routing.slot_map is not None and not is_full(layer, fitted.experts):
        install_ragged(layer, fitted.experts, routing.slot_map, layout)
        return
    if fitted is not None:
        width = int(fitted.experts.widths.max())
        parameters = layer.family.narrow(layer, parameters, width)
        view = layer.family.view(layer, parameters).tensors()
        for name, tensor in fitted.experts.to_uniform(width).tensors().items():
            view[name].copy_(tensor)
    if routing.slot_map is not None:
        install_mapped(layer, parameters, routing.slot_map, layout)
    elif layer.family.stored_experts(layer) == merged.groups.num_groups < layer.num_slots:
        replace_experts(layer, parameters)  # the router was cut for the fit
    else:
        install_native(layer, parameters, routing.rows, merged.groups.group_of_expert)


def is_full(layer: MoeLayer, experts: PackedExperts) -> bool:
    """Whether every expert has all the neurons that the original's have."""
    return bool((experts.widths == layer.intermediate_size).all())


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


def group_experts(
    layer: MoeLayer, recipe: Recipe, statistics: LayerStatistics, weights: ExpertWeights, num_experts: int
) -> ExpertGroups:
    """Which experts of a layer become one, by the recipe's saliency, similarity and grouping."""
    saliency = SALIENCY[recipe.saliency](statistics, weights, **recipe.saliency_options)
    similarity = None
    if recipe.similarity is not None:
        similarity = SIMILARITY[recipe.similarity](statistics, weights, **recipe.similarity_options)
    # A group-limited router that loses rows must lose the same number in each of its groups.
    partitions = layer.num_router_groups if recipe.layout == "native" else 1
    return GROUPING[recipe.grouping](saliency, similarity, num_experts, partitions, **recipe.grouping_options)


@torch.no_grad()
def merge_groups(
    weights: ExpertWeights, groups: ExpertGroups, recipe: Recipe, importance: Tensor, into: ExpertWeights
) -> None:
    """Write each group's merged expert into `into` (M experts, same device and dtype as `weights`).

    Products are float32 and rounded once, when they are written. A group of one keeps its expert bit by bit.
    """
    order = None
    if recipe.alignment is not None and recipe.merging is not None:
        order = ALIGNMENT[recipe.alignment](weights, groups, **recipe.alignment_options)
    targets = into.tensors()
    for group in range(groups.num_groups):
        members = groups.members(group)
        alone = recipe.merging is None or members.numel() == 1
        for name, tensor in weights.tensors().items():
            if alone:
                targets[name][group] = tensor[members[0]]
                continue
            aligned = tensor[members.to(tensor.device)].float()
            if order is not None:
                aligned = permute(name, aligned, order[members])
            matrices = aligned if aligned.dim() == 3 else aligned[:, :, None]  # a bias is a matrix of one column
            merged = MERGING[recipe.merging](matrices, importance[members], **recipe.merging_options)
            targets[name][group] = merged.reshape(targets[name][group].shape)


def duplicate_share(groups: ExpertGroups, sample: LayerInputs) -> float | None:
    """Share of the held-out slots whose expert an earlier slot of the same token has; None without tokens."""
    if sample.is_empty:
        return None
    slots = torch.cat([index.cpu() for _, index, _ in sample.experts_inputs])
    weights = torch.cat([weights.cpu() for _, _, weights in sample.experts_inputs])
    experts = groups.group_of_expert[slots].masked_fill(weights == 0, -1)
    same = (experts[:, :, None] == experts[:, None, :]) & (experts >= 0)[:, None, :]
    return same.tril(-1).any(-1).double().mean().item()


def worth_collapsing(recipe: Recipe, share: float | None) -> bool:
    """Whether duplicates of a token are computed once: as the recipe says, or where there are enough of them."""
    if recipe.collapse_duplicates == "auto":
        return share is not None and share >= WORTH_COLLAPSING
    return bool(recipe.collapse_duplicates)
