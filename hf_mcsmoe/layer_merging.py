"""The experts of one layer become fewer: saliency, similarity, grouping, alignment, merging, routing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import ALIGNMENT
from .grouping import GROUPING
from .merging import MERGING
from .modeling.offload import fetched
from .recipe import Recipe
from .routing import ROUTING
from .saliency import SALIENCY
from .similarity import SIMILARITY
from .types import ExpertGroups, ExpertWeights, LayerStatistics, MoeLayer, Routing, permute


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
