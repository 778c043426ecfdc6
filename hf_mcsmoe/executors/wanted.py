"""What calibration must leave of every layer, for one recipe or for several at once."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..recipe import Recipe

DRAWS = ("fit_tokens", "every_expert_tokens", "gradient_tokens", "seed")  # which tokens are used for what


@dataclass(frozen=True)
class Wanted:
    """Statistics and kept tokens; the same for all layers."""

    statistics: frozenset[str]  # names in `STATISTICS`
    keeps_tokens: bool  # layers are run again on what they were given
    fit_tokens: int  # about how many of these
    every_expert_tokens: int  # about how many tokens all experts are run on, where a statistic asks for that
    gradient_tokens: int  # about how many run backward too, where a statistic reads gradients
    seed: int
    outputs: bool = False  # and what the experts give for the kept tokens
    sequential: bool = False  # each layer's come from the compressed layers before it
    targets: str | None = None  # "original_stream": and what brings their residual stream back to the original's

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {**self.__dict__, "statistics": sorted(self.statistics)}


def wanted_by(recipe: Recipe) -> Wanted:
    """What one recipe needs."""
    return Wanted(
        recipe.statistics_needed(),
        recipe.needs_inputs,
        recipe.fit_tokens,
        recipe.every_expert_tokens,
        recipe.gradient_tokens,
        recipe.seed,
        recipe.is_fitted_on_tokens and not recipe.sequential,  # then the forward ends before the layer's own experts
        recipe.sequential,
        recipe.targets,
    )


def wanted_by_all(recipes: Iterable[Recipe]) -> Wanted:
    """What serves every one of several recipes, if none of them is made sequential.

    Raises:
        ValueError: No recipe, or recipes that draw their tokens in different ways.
    """
    each = [wanted_by(recipe) for recipe in recipes]
    if not each:
        raise ValueError("No recipe is given, so there is nothing to collect. Name at least one preset.")
    for name in DRAWS:
        values = sorted({getattr(one, name) for one in each})
        if len(values) > 1:
            raise ValueError(f"The recipes have {name} {values}, but one collection has one. Make them equal.")
    return Wanted(
        frozenset().union(*(one.statistics for one in each)),
        any(one.keeps_tokens for one in each),
        each[0].fit_tokens,
        each[0].every_expert_tokens,
        each[0].gradient_tokens,
        each[0].seed,
        any(one.outputs for one in each),
    )
