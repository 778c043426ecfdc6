"""The experts of one layer become fewer: saliency, similarity, grouping, alignment, merging, routing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..alignment import ALIGNMENT
from ..expert_values import PackedExperts
from ..grouping import GROUPING
from ..merging import MERGING
from ..modeling.offload import fetched
from ..recipe import Recipe
from ..routing import ROUTING
from ..saliency import SALIENCY
from ..similarity import SIMILARITY
from ..types import ExpertGroups, ExpertWeights, LayerStatistics, MoeLayer, Routing, permute
from .protection import group_around

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens

Supply = Mapping[str, Callable[[], Any]]  # what steps may ask for beside their fixed arguments


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """What grouping and merging made of a layer, before it is put into the model."""

    groups: ExpertGroups
    routing: Routing
    parameters: dict[str, Tensor]  # M experts as the family stacks them
    similarity: Tensor | None = None  # (N, N), of the original experts; None: the recipe does not look at it
    importance: Tensor | None = None  # (N,): of the original experts
    transfer: Tensor | None = None  # (N, M) shares of experts that went into groups; None: whole members
    # M experts with all neurons of their members, float32. None: `parameters` are all there is; else these are only
    # the dominant experts.
    unions: PackedExperts | None = None

    @property
    def experts_kept(self) -> Tensor:
        """Which of the N experts the neurons before a selection are of, those of each in one piece. int64."""
        if self.unions is None:
            return self.groups.dominant_of_group
        return torch.cat([self.groups.members(group) for group in range(self.groups.num_groups)])


def merge_layer(
    layer: MoeLayer,
    recipe: Recipe,
    statistics: LayerStatistics,
    num_experts: int,
    original: "Callable[[], LayerTokens] | None" = None,
    protected: Tensor | None = None,
) -> MergedLayer:
    """Group and merge the experts of a layer, which is left as it is.

    Args:
        layer: As found in the original model.
        recipe: The steps.
        statistics: Of the layer.
        num_experts: M.
        original: The kept tokens, for steps that ask for "tokens"; made only then.
        protected: Experts that stay alone, (N,) bool; None for none.
    """
    with fetched(layer.experts):
        old = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
        weights = layer.family.view(layer, old)
        supply = {"statistics": lambda: statistics, "tokens": original, "weights": lambda: weights}
        supply |= {"seed": lambda: recipe.seed, "layout": lambda: recipe.layout}
        groups, similarity = group_experts(layer, recipe, statistics, weights, num_experts, supply, protected)
        new = {name: p.new_empty((num_experts, *p.shape[1:])) for name, p in old.items()}
        importance = SALIENCY[recipe.importance](statistics, weights, **recipe.importance_options)
        merge_groups(weights, groups, recipe, importance, into=layer.family.view(layer, new), supply=supply)
        for name, rows in layer.passive_expert_rows.items():
            new[name] = torch.cat([new[name], rows.detach()])
        unites = recipe.unites and num_experts < layer.num_slots
        unions = unite_groups(weights, groups, recipe, importance, supply) if unites else None
        transfer = transfer_of(weights, groups, recipe)
    return MergedLayer(groups, ROUTING[recipe.layout](groups), new, similarity, importance, transfer, unions)


def transfer_of(weights: ExpertWeights, groups: ExpertGroups, recipe: Recipe) -> Tensor | None:
    """Which share of each expert went into each group, (N, M), where a router rule may ask and the merge says it."""
    shares = MERGING.trait(recipe.merging, "transfer") if recipe.router and recipe.merging else None
    return shares and shares(weights, groups, MERGING.options(recipe.merging) | recipe.merging_options)


def group_experts(
    layer: MoeLayer,
    recipe: Recipe,
    statistics: LayerStatistics,
    weights: ExpertWeights,
    num_experts: int,
    supply: Supply | None = None,
    protected: Tensor | None = None,
) -> tuple[ExpertGroups, Tensor | None]:
    """Which experts of a layer become one, by the recipe's saliency, similarity and grouping; and that similarity.

    Those that are `protected`, (N,) bool, are groups of one.
    """
    supply = supply or {}
    saliency = SALIENCY[recipe.saliency](statistics, weights, **recipe.saliency_options)
    similarity = None
    if recipe.similarity is not None:
        how = {"options": recipe.similarity_options, "supply": supply}
        similarity = SIMILARITY.call(recipe.similarity, statistics, weights, **how)
    # A group-limited router that loses rows must lose the same number in each of its groups.
    partitions = layer.num_router_groups if recipe.layout == "native" else 1

    def group(saliency: Tensor, similarity: Tensor | None, num_groups: int, supply: Supply) -> ExpertGroups:
        how = {"options": recipe.grouping_options, "supply": supply}
        return GROUPING.call(recipe.grouping, saliency, similarity, num_groups, partitions, **how)

    handles_protected = "protected" in GROUPING.asks_for(recipe.grouping)
    if protected is not None and not handles_protected:
        return group_around(protected, group, saliency, similarity, num_experts, supply), similarity
    alone = torch.zeros(layer.num_slots, dtype=torch.bool) if protected is None else protected
    return group(saliency, similarity, num_experts, {**supply, "protected": lambda: alone}), similarity


@torch.no_grad()
def merge_groups(
    weights: ExpertWeights,
    groups: ExpertGroups,
    recipe: Recipe,
    importance: Tensor,
    into: ExpertWeights,
    supply: Supply | None = None,
) -> None:
    """Write each group's merged expert into `into` (M experts, same device and dtype as `weights`).

    Products are float32 and rounded once, when they are written. A group of one keeps its expert bit by bit. Where
    groups become unions, which `into` could not hold, it gets their dominant experts: see `unite_groups`.
    """
    supply = supply or {}
    order = None
    if recipe.aligns:
        how = {"options": recipe.alignment_options, "supply": supply}
        order = ALIGNMENT.call(recipe.alignment, weights, groups, **how)
    targets = into.tensors()
    if recipe.merging is not None and MERGING.trait(recipe.merging, "takes") == "layer":
        supply = {**supply, "order": lambda: order}
        how = {"options": recipe.merging_options, "supply": supply}
        merged = MERGING.call(recipe.merging, weights, groups, importance, **how)
        for name, tensor in merged.tensors().items():
            targets[name].copy_(tensor)
        return
    for group in range(groups.num_groups):
        members = groups.members(group)
        if recipe.merging is None or recipe.unites or members.numel() == 1:
            merged = {name: tensor[members[0]] for name, tensor in weights.tensors().items()}
        else:
            of_group = {"members": lambda members=members: members, "order": lambda: order}
            merged = merge_group(weights, members, order, recipe, importance, {**supply, **of_group})
        for name, tensor in merged.items():
            targets[name][group] = tensor.reshape(targets[name][group].shape)


@torch.no_grad()
def unite_groups(
    weights: ExpertWeights, groups: ExpertGroups, recipe: Recipe, importance: Tensor, supply: Supply
) -> PackedExperts:
    """The M experts of a recipe that unites, each as wide as its members together, float32."""

    def union(group: int) -> ExpertWeights:
        members = groups.members(group)
        how = {**supply, "members": lambda: members, "order": lambda: None}
        return ExpertWeights(**merge_group(weights, members, None, recipe, importance, how))

    return PackedExperts.from_experts(union(group) for group in range(groups.num_groups))


def merge_group(
    weights: ExpertWeights, members: Tensor, order: Tensor | None, recipe: Recipe, importance: Tensor, supply: Supply
) -> dict[str, Tensor]:
    """The merged expert of one group, float32, by the names of `ExpertWeights`."""
    aligned = {}
    for name, tensor in weights.tensors().items():
        aligned[name] = tensor[members.to(tensor.device)].float()
        if order is not None:
            aligned[name] = permute(name, aligned[name], order[members])
    how = {"options": recipe.merging_options, "supply": supply}
    if MERGING.trait(recipe.merging, "takes", "matrices") == "experts":
        return MERGING.call(recipe.merging, ExpertWeights(**aligned), importance[members], **how).tensors()
    # A bias is a matrix of one column.
    matrices = {name: t if t.dim() == 3 else t[:, :, None] for name, t in aligned.items()}
    return {name: MERGING.call(recipe.merging, t, importance[members], **how) for name, t in matrices.items()}
