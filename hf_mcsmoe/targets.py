"""What the refit and the matching of a layer may aim at."""

from typing import Any

from .registry import closest

ORIGINAL_STREAM = "original_stream"
TARGETS = (None, ORIGINAL_STREAM)


def check_targets(recipe: Any) -> None:
    """Refuse a recipe with `targets` that do not exist, or that nothing reads.

    Raises:
        ValueError: See above; or the recipe is not sequential, so that all streams are the original's anyway.
    """
    if recipe.targets not in TARGETS:
        raise ValueError(
            f"targets is {recipe.targets!r}, allowed are {TARGETS}.{closest(str(recipe.targets), [ORIGINAL_STREAM])}"
        )
    if recipe.targets is not None and not (recipe.sequential and (recipe.refit or recipe.matching)):
        raise ValueError(
            f"targets is {recipe.targets!r}, but sequential is {recipe.sequential}, refit {recipe.refit!r} and "
            f"matching {recipe.matching!r}. Use sequential=True with refit='least_squares', or leave targets out."
        )
