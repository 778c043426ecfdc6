"""The constants that dropped slots of a layer add, and what they leave for its experts to give."""

import dataclasses

from torch import Tensor

from ..constants import CONSTANTS
from ..observation.layer_tokens import LayerTokens
from ..observation.token_batches import RoutedTokens
from ..recipe import Recipe
from ..types import ExpertGroups, LayerStatistics


def constants_of_layer(recipe: Recipe, statistics: LayerStatistics, groups: ExpertGroups) -> Tensor | None:
    """What dropped slots of a layer add times their gates, (R, D) float64 in the order of the slots; None: nothing."""
    dropped = groups.group_of_expert < 0
    if recipe.constants is None or not dropped.any():
        return None
    return CONSTANTS[recipe.constants](statistics, **recipe.constants_options)[dropped]


def without_constants(original: LayerTokens, tokens: LayerTokens, dropped: Tensor, constants: Tensor) -> LayerTokens:
    """Tokens whose targets are what is left for the experts when the constants of dropped slots have been added.

    They also get the gates of these slots, (t, R), so that the constants can be fitted with the experts.
    """
    vectors = constants.float()

    def what_is_left(batch: RoutedTokens, gates: Tensor) -> RoutedTokens:
        targets = None if batch.targets is None else batch.targets - gates @ vectors.to(gates.device)
        return dataclasses.replace(batch, targets=targets, dropped_gates=gates)

    calibration, held_out = (
        [what_is_left(batch, first.gates[:, dropped]) for first, batch in zip(before, now, strict=True)]
        for before, now in ((original.calibration, tokens.calibration), (original.held_out, tokens.held_out))
    )
    return dataclasses.replace(tokens, calibration=calibration, held_out=held_out)
