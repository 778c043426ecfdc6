"""Slots of one token that hold the same stored expert, which can be computed once."""

import torch

from ..observation.layer_inputs import LayerInputs
from ..recipe import Recipe
from ..types import ExpertGroups

# Share of duplicate slots from which computing them once is faster (examples/benchmarks/collapse_duplicates.py).
WORTH_COLLAPSING = 0.1


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
