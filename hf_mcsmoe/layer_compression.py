"""One layer through the steps of a recipe: group, align, merge, route, install, and measure what it did."""

import time
from typing import Any

import torch
from torch import Tensor

from .alignment import ALIGNMENT
from .executors.in_memory import HeldOutSample, ignore_passive
from .grouping import GROUPING
from .merging import MERGING
from .modeling.experts import install_mapped, install_native
from .modeling.offload import fetched
from .recipe import Recipe
from .routing import ROUTING
from .saliency import SALIENCY
from .similarity import SIMILARITY
from .types import ExpertGroups, ExpertWeights, LayerReport, LayerStatistics, MoeLayer, permute

# Share of duplicate slots from which computing them once is faster (examples/benchmarks/collapse_duplicates.py).
WORTH_COLLAPSING = 0.1


def compress_layer(
    layer: MoeLayer, recipe: Recipe, statistics: LayerStatistics, num_experts: int, sample: HeldOutSample
) -> tuple[LayerReport, dict[str, Any]]:
    """Compress one layer in place. Extra memory: the new experts, and the members of one group in float32.

    Args:
        layer: As found in the original model.
        recipe: The steps.
        statistics: Of this layer.
        num_experts: M.
        sample: What held-out tokens gave the layer; may be empty.

    Returns:
        What it did, and the layer's entry in the layout of a mapped checkpoint.
    """
    start = time.perf_counter()
    before = routed_output(layer, sample)
    parameters_before, bytes_before = layer.parameters_per_expert, layer.bytes_per_expert
    with fetched(layer.experts):
        old = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
        weights = layer.family.view(layer, old)
        groups = group_experts(layer, recipe, statistics, weights, num_experts)
        new = {name: p.new_empty((num_experts, *p.shape[1:])) for name, p in old.items()}
        importance = SALIENCY[recipe.importance](statistics, weights, **recipe.importance_options)
        merge_groups(weights, groups, recipe, importance, into=layer.family.view(layer, new))
        for name, rows in layer.passive_expert_rows.items():
            new[name] = torch.cat([new[name], rows.detach()])
        del old, weights
    routing = ROUTING[recipe.layout](groups)
    share = duplicate_share(groups, sample) if routing.slot_map is not None else None
    layout = {
        "num_experts": num_experts,
        "num_slots": layer.num_slots,
        "has_dropped": bool((groups.group_of_expert < 0).any()),
        "collapse_duplicates": worth_collapsing(recipe, share),
    }
    if routing.slot_map is not None:
        install_mapped(layer, new, routing.slot_map, layout)
        after = routed_output(layer, sample)
    else:
        install_native(layer, new, routing.rows, groups.group_of_expert)
        after = routed_output(layer, sample, reroute=True)
    report = LayerReport(
        layer=layer.name,
        num_slots=layer.num_slots,
        num_experts_before=layer.num_experts,
        num_experts_after=num_experts,
        parameters_before=parameters_before * layer.num_experts,
        parameters_after=parameters_before * num_experts,
        bytes_before=bytes_before * layer.num_experts,
        bytes_after=bytes_before * num_experts,
        relative_error=relative_error(before, after),
        duplicate_share=share,
        unused_experts=int((statistics.selection_count == 0).sum()),
        seconds=time.perf_counter() - start,
        group_of_expert=groups.group_of_expert.tolist(),
        dominant_of_group=groups.dominant_of_group.tolist(),
        usage_frequency=statistics.usage_frequency.tolist(),
    )
    return report, layout


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


@torch.no_grad()
def routed_output(layer: MoeLayer, sample: HeldOutSample, reroute: bool = False) -> list[Tensor]:
    """What the layer's experts give for the held-out tokens, one (t, D) tensor a batch.

    Args:
        layer: In its present state.
        sample: Inputs of the experts and of the router.
        reroute: Ask the router again, for layouts that change it, instead of using the sampled choice.
    """
    outputs = []
    for position, (hidden_states, index, weights) in enumerate(sample.experts_inputs):
        if reroute:
            is_beyond = (weights == 0).all(-1, keepdim=True) & layer.family.has_capacity
            index, weights = layer.family.route(layer, *sample.router_call(position, layer.block))
            index, weights = ignore_passive(index, weights, layer.family.stored_experts(layer))
            weights = weights.masked_fill(is_beyond, 0)
        outputs.append(layer.family.run_experts(layer, hidden_states, index, weights))
    return outputs


def relative_error(before: list[Tensor], after: list[Tensor]) -> float | None:
    """|after - before|^2 / |before|^2 over all tokens; None without tokens or where the output was all zero."""
    pairs = list(zip(before, after, strict=True))
    change = sum((new.double() - old.double()).square().sum().item() for old, new in pairs)
    energy = sum(old.double().square().sum().item() for old in before)
    return change / energy if energy > 0 else None


def duplicate_share(groups: ExpertGroups, sample: HeldOutSample) -> float | None:
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
