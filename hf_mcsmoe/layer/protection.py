"""Experts that stay as they are whatever a recipe does to the others: finding them, and grouping around them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..grouping import GROUPING
from ..protection import PROTECTION
from ..recipe import Recipe
from ..statistics import STATISTICS
from ..types import ExpertGroups, ExpertWeights, LayerStatistics


def protected_experts(recipe: Recipe, statistics: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
    """The protected experts (N,) bool of each layer that has some, by its name.

    Args:
        recipe: `protect` names the rule; None protects none.
        statistics: Of all layers that are compressed, in the order of the model.
    """
    if recipe.protect is None:
        return {}
    found = PROTECTION[recipe.protect](list(statistics.values()), **recipe.protect_options)
    return {name: mask for name, mask in zip(statistics, found, strict=True) if mask.any()}


def with_protected(saliency: Tensor, protected: Tensor | None) -> Tensor:
    """Saliency (N,) that is infinite for protected experts."""
    return saliency if protected is None else saliency.masked_fill(protected, math.inf)


def check_room(recipe: Recipe, num_experts: Mapping[str, int], protected: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a layer keeps too few experts for those that are protected.

    Args:
        recipe: What is asked.
        num_experts: M by the name of the layer.
        protected: From `protected_experts`.
    """
    can_drop = GROUPING.trait(recipe.grouping, "drops", False)
    for name, mask in protected.items():
        num_protected, kept = int(mask.sum()), num_experts[name]
        least = num_protected + (0 if can_drop or num_protected == mask.numel() else 1)
        if kept < least:
            raise ValueError(
                f"num_experts is {kept} for {name!r}, but protect {recipe.protect!r} found {num_protected} experts "
                f"there, so at least {least} must stay. Raise keep, or leave the layer out with exclude_layers."
            )


def group_around(
    protected: Tensor,
    group: Callable[..., ExpertGroups],
    saliency: Tensor,
    similarity: Tensor | None,
    num_experts: int,
    supply: Mapping[str, Callable[[], Any]],
) -> ExpertGroups:
    """Groups of the experts that are not protected, made without the others, and each protected one alone.

    Args:
        protected: (N,) bool.
        group: (saliency, similarity, number of groups, supply) -> `ExpertGroups` of as many experts as it is given.
        saliency: (N,).
        similarity: (N, N) or None.
        num_experts: M, with the protected ones.
        supply: What `group` may ask for: "statistics" and "weights" are cut to its experts.
    """
    rest = (~protected).nonzero().flatten()
    alone = protected.nonzero().flatten()
    num_groups = num_experts - alone.numel()
    leaders, group_of_rest = rest[:0], torch.full_like(rest, -1)
    if num_groups:
        supply = {
            **supply,
            "statistics": lambda: statistics_of(supply["statistics"](), rest),
            "weights": lambda: weights_of(supply["weights"](), rest),
        }
        between = similarity[rest[:, None], rest] if similarity is not None else None
        groups = group(saliency[rest], between, num_groups, supply)
        leaders, group_of_rest = rest[groups.dominant_of_group], groups.group_of_expert
    dominant_of_group = torch.cat([alone, leaders]).sort().values
    place = torch.full((protected.numel(),), -1)
    place[dominant_of_group] = torch.arange(num_experts)
    group_of_expert = place.clone()
    is_grouped = group_of_rest >= 0
    group_of_expert[rest[is_grouped]] = place[leaders[group_of_rest[is_grouped]]]
    return ExpertGroups(group_of_expert, dominant_of_group)


def weights_of(weights: ExpertWeights, experts: Tensor) -> ExpertWeights:
    """Some of the experts, as copies."""
    return ExpertWeights(**{name: tensor[experts.to(tensor.device)] for name, tensor in weights.tensors().items()})


def statistics_of(statistics: LayerStatistics, experts: Tensor) -> LayerStatistics:
    """What statistics say of some of the experts: their rows, and their columns in a matrix of pairs of experts."""
    num_slots = statistics.selection_count.numel()
    sums = {}
    for name, value in statistics.sums.items():
        rows = value[experts]
        is_pairs = STATISTICS.trait(name, "of") != "expert" and value.shape == (num_slots, num_slots)
        sums[name] = rows[:, experts] if is_pairs else rows
    return LayerStatistics(statistics.num_tokens, statistics.selection_count[experts], sums)
