"""How many experts each layer keeps in a streaming run, decided once and written down."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..allocation import ALLOCATION
from ..layer.protection import check_room, protected_experts, with_protected
from ..layouts import budget_of_layer
from ..pipeline import leave_unreached
from ..protection import PROTECTION
from ..types import LayerStatistics, MoeLayer

if TYPE_CHECKING:
    from .streaming_run import StreamingRun


@dataclass(frozen=True)
class Budgets:
    """By the name of the MoE layer; a layer that no calibration token reached may be missing."""

    num_experts: dict[str, int]  # M
    protected_of_layer: dict[str, list[int]]  # experts that stay as they are

    def protected(self, layer: MoeLayer) -> Tensor | None:
        """Which experts of a layer stay as they are, (N,) bool; None for none."""
        experts = self.protected_of_layer.get(layer.name)
        if experts is None:
            return None
        mask = torch.zeros(layer.num_slots, dtype=torch.bool)
        mask[experts] = True
        return mask


def decide_budgets(run: "StreamingRun") -> Budgets:
    """As the recipe's allocation rule says, or as an earlier run of the same journal found.

    Raises:
        ValueError: More experts are protected than a layer keeps, or no calibration token reached a layer that the
            native layout needs, or any layer.
    """
    earlier = run.journal.done("budgets")
    if earlier:
        return Budgets(earlier[0]["num_experts"], earlier[0]["protected"])
    budgets = allot(run)
    run.journal.append({"step": "budgets", "layer": 0, **budget_record(budgets)})
    return budgets


def budget_record(budgets: Budgets) -> dict[str, dict]:
    """As JSON, for the journal."""
    return {"num_experts": budgets.num_experts, "protected": budgets.protected_of_layer}


def allot(run: "StreamingRun") -> Budgets:
    """Ask the allocation rule. Memory: what it and protection read of the statistics; the rest, layer by layer."""
    recipe, layers = run.recipe, run.layers
    statistics: dict[str, LayerStatistics] = {}
    saliency_of_layer = [torch.full((layer.num_slots,), 1 / layer.num_slots) for layer in layers]
    protected: dict[str, Tensor] = {}
    if run.passes.looks_at_all:
        statistics, saliency = look_at_all(run)
        # What is left as it is, is said at the end of a run.
        layers = [layer for layer in layers if layer.name in statistics]
        if recipe.layout == "native" or not layers:
            leave_unreached(run.layers, statistics, recipe)
        protected = protected_experts(recipe, statistics)
        saliency_of_layer = [with_protected(saliency[x.name], protected.get(x.name)) for x in layers]
    supply = {"statistics_of_layer": lambda: [statistics[x.name] for x in layers], "seed": lambda: recipe.seed}
    how = {"options": recipe.allocation_options, "supply": supply}
    allotted = ALLOCATION.call(recipe.allocation, saliency_of_layer, budget_of_layer(layers, recipe), **how)
    num_experts = {layer.name: int(number) for layer, number in zip(layers, allotted, strict=True)}
    check_room(recipe, num_experts, protected)
    return Budgets(num_experts, {name: mask.nonzero().flatten().tolist() for name, mask in protected.items()})


def look_at_all(run: "StreamingRun") -> tuple[dict[str, LayerStatistics], dict[str, Tensor]]:
    """(what budgets read of the statistics, saliency) of each layer that calibration reached."""
    names = set(ALLOCATION.needs(run.recipe.allocation))
    if run.recipe.protect is not None:
        names |= PROTECTION.needs(run.recipe.protect)
    statistics, saliency = {}, {}
    for layer in run.layers:
        found, judged = run.first_look(layer)
        if found is not None:
            sums = {name: found.sums[name] for name in names if name in found.sums}
            statistics[layer.name] = LayerStatistics(found.num_tokens, found.selection_count, sums)
            saliency[layer.name] = judged
    return statistics, saliency
