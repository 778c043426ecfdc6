"""Training the experts of one layer, and its router, to give what the original layer gave."""

import dataclasses

from ..executors.in_memory import Collected
from ..matching import MATCHING
from ..matching.tokens import MatchingTokens, TrainableRouter, can_train_router
from ..observation.layer_tokens import LayerTokens
from ..recipe import Recipe
from ..types import MoeLayer
from .fit import FittedExperts, refit_down


def match_layer(
    layer: MoeLayer, recipe: Recipe, collected: Collected, tokens: LayerTokens, fitted: FittedExperts
) -> FittedExperts:
    """Train the experts, and with the option `router` the router in place, then refit under the gates it gives now.

    What the first refit found beside the experts counts as given while they are trained; the second one goes on there.

    Without held-out tokens nothing could tell whether that made the layer better: it is left as it is.
    """
    if not tokens.held_out:
        return fitted
    how = {"seed": recipe.seed, **recipe.matching_options}
    router = others = None
    if trains_router(layer, recipe):
        router = TrainableRouter(layer, collected.calibration, tokens.assignment)
        others = router.beside(collected.held_out)
    seen = MatchingTokens(tokens.calibration, router, fitted.beside)
    held_out = MatchingTokens(tokens.held_out, others, fitted.beside)
    experts = MATCHING[recipe.matching](fitted.experts, tokens.activation, seen, held_out, **how)
    if router is not None:
        router.write_back(layer.router)
    fitted = dataclasses.replace(fitted, experts=experts)
    if recipe.refit is None:
        return fitted
    kept = seen.batches(), held_out.batches()
    return refit_down(experts, tokens.activation, recipe, *kept, beside=fitted.beside)


def trains_router(layer: MoeLayer, recipe: Recipe) -> bool:
    """Whether output matching changes the router of a layer."""
    if recipe.matching is None:
        return False
    wanted = (MATCHING.options(recipe.matching) | recipe.matching_options).get("router", False)
    return wanted and can_train_router(layer)
