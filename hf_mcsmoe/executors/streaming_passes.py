"""How often the weights are read, and what each pass over them does."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..allocation import ALLOCATION
from ..calibration import Calibration
from ..layouts import budget_of_layer
from ..protection import PROTECTION
from ..recipe import NOT_STATISTICS, Recipe
from ..saliency import SALIENCY
from ..saved_statistics import SavedStatistics
from ..types import MoeLayer
from .in_memory import FIT_HELD_OUT_TOKENS
from .kept_inputs import bytes_per_token
from .wanted import wanted_by

ONE_PASS_ALLOCATIONS = ("uniform",)  # these do not look at the statistics of other layers


@dataclass(frozen=True)
class Passes:
    """The last pass compresses and writes; there may be one before it.

    Attributes:
        looks_at_all: Budgets or protection depend on the statistics of all layers.
        has_first: That takes a pass of its own.
        runs_data_first: The calibration data are run in it.
        first_needs: Statistics that the first pass collects.
        runs_data_last: The calibration data are run in the last pass.
        last_needs: Statistics that the last pass collects.
    """

    looks_at_all: bool
    has_first: bool
    runs_data_first: bool
    first_needs: frozenset[str]
    runs_data_last: bool
    last_needs: frozenset[str]

    @property
    def number(self) -> int:
        """Passes over the weights."""
        return 1 + self.has_first

    def forwards(self, recipe: Recipe) -> int:
        """How often the calibration data go through a decoder layer with experts."""
        last = (2 if recipe.sequential else 1) + (recipe.targets is not None)
        return self.runs_data_first + self.runs_data_last * last

    @property
    def descriptions(self) -> list[str]:
        """What each pass does, for the user."""
        collects = "statistics, " if self.last_needs else "tokens, "
        last = f"{collects if self.runs_data_last else ''}merging"
        if not self.has_first:
            return [f"pass 1 of 1: {last}"]
        first = "statistics" if self.runs_data_first else "saliency"
        return [f"pass 1 of 2: {first}", f"pass 2 of 2: {last}"]


def plan_passes(
    recipe: Recipe, layers: Sequence[MoeLayer], data: Calibration | SavedStatistics, *, keeps_tokens: bool
) -> Passes:
    """The passes that a recipe takes.

    One where each layer's budget is known beforehand: all layers keep equally many experts, or all keep all and the
    allocation rule reads no statistics. Else a first one for the statistics of all layers, which stay on the disk with
    the kept tokens, so that the last one runs no data, unless

    - the recipe is sequential: each layer's statistics come from the compressed layers before it, in the last pass;
      the first collects only what budgets depend on, of the original layers, as `compress_in_memory` does. With
      `targets` each layer runs on what the original layers before it give, too;
    - there is no room for the tokens: the last pass runs the data again, for these alone.

    With saved statistics no data are run, and a first pass is needed only where saliency reads weights.

    Args:
        recipe: Checked.
        layers: Those to compress.
        data: What to calibrate on, or what calibration left.
        keeps_tokens: Whether there is room for kept tokens, see `has_room_for_tokens`.
    """
    all_stay = budget_of_layer(layers, recipe) == [layer.num_slots for layer in layers]
    all_stay = all_stay and "statistics_of_layer" not in ALLOCATION.asks_for(recipe.allocation)
    looks_at_all = recipe.protect is not None or not (all_stay or recipe.allocation in ONE_PASS_ALLOCATIONS)
    wanted, nothing = wanted_by(recipe), frozenset()
    if isinstance(data, SavedStatistics):
        reads_weights = looks_at_all and "weights" in SALIENCY.needs(recipe.saliency)
        return Passes(looks_at_all, reads_weights, False, nothing, False, nothing)
    if not looks_at_all:
        return Passes(False, False, False, nothing, True, wanted.statistics)
    if recipe.sequential:
        return Passes(True, True, True, needs_of_budgets(recipe), True, wanted.statistics)
    return Passes(True, True, True, wanted.statistics, wanted.keeps_tokens and not keeps_tokens, nothing)


def needs_of_budgets(recipe: Recipe) -> frozenset[str]:
    """Statistics that decide how many experts layers keep, and which are protected."""
    needs = SALIENCY.needs(recipe.saliency) | ALLOCATION.needs(recipe.allocation)
    if recipe.protect is not None:
        needs |= PROTECTION.needs(recipe.protect)
    return needs - NOT_STATISTICS


def has_room_for_tokens(
    folder: Path, recipe: Recipe, layers: Sequence[MoeLayer], data: Calibration | SavedStatistics, result_bytes: int
) -> bool:
    """Whether the disk of `folder` can hold the kept tokens of all layers beside `result_bytes` of the result."""
    if isinstance(data, SavedStatistics):
        return True
    tokens = min(recipe.fit_tokens, data.num_tokens) + FIT_HELD_OUT_TOKENS
    needed = sum(tokens * bytes_per_token(layer, wanted_by(recipe)) for layer in layers)
    return needed + result_bytes <= shutil.disk_usage(folder).free
