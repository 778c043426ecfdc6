"""The recipes that the preset "auto" tries, and which of them a model can have."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .presets import PRESETS
from .recipe import Recipe
from .recipe_reading import recipe_from_preset

AUTO = "auto"
# What a request for "auto" may say; everything else is the candidates' own.
TAKEN = ("keep", "layout", "exclude_layers", "fit_tokens", "sequential", "collapse_duplicates", "seed")
MOST_EXPERTS = 0.75  # of the candidate that drops experts before it narrows the others
CANDIDATES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "mapped": [
        ("joint-obs", {}),
        ("joint-obs-matched", {}),
        ("joint-obs-corrected-matched", {}),
        ("m-smoe", {"refit": "least_squares"}),
    ],
    "native": [
        ("narrow-obs", {}),
        ("narrow-obs-matched", {}),
        ("narrow-obs-corrected-matched", {}),
        ("narrow-obs", {"keep_experts": MOST_EXPERTS}),
        ("frequency", {"refit": "least_squares"}),
    ],
}
FALLBACK = {"mapped": "m-smoe", "native": "frequency"}  # possible wherever a layout is


@dataclass(frozen=True)
class Candidate:
    """A recipe that may be tried."""

    preset: str
    changes: dict[str, Any]  # of the preset's steps
    recipe: Recipe
    refused: str | None = None  # why the model cannot have it


def candidates(request: Recipe, check: Callable[[Recipe], None]) -> list[Candidate]:
    """What "auto" tries for a request, in this order, with the reasons against those that the model cannot have.

    All have the request's budget `keep`, up to rounding: to neurons of a layer, widths of the native layout, or whole
    experts. That decides nothing but in tiny models. In the native layout
    one candidate drops a quarter of the experts first and narrows the others; it exists where `keep` is less.

    Args:
        request: Of the preset "auto"; only the fields in `TAKEN` may be set.
        check: Raises ValueError for a recipe that the model cannot have, see `layouts.check_layout`.

    Raises:
        ValueError: The request sets something else.
    """
    taken = _taken(request)
    found = []
    for preset, changes in CANDIDATES[request.layout]:
        if request.keep >= changes.get("keep_experts", 1.1):
            continue
        candidate = Candidate(preset, changes, recipe_of(preset, taken, changes))
        try:
            check(candidate.recipe)
        except ValueError as error:
            candidate = dataclasses.replace(candidate, refused=str(error))
        found.append(candidate)
    return found


def recipe_of(preset: str, taken: dict[str, Any], changes: dict[str, Any]) -> Recipe:
    """The recipe of a candidate: sequential where its targets need that, otherwise as the request says."""
    is_sequential = "targets" in PRESETS[preset].recipe
    said = {name: value for name, value in taken.items() if not (is_sequential and name == "sequential")}
    return recipe_from_preset(preset, **said, **changes)


def fallback(request: Recipe) -> Candidate:
    """What "auto" takes where no candidate is possible."""
    preset = FALLBACK[request.layout]
    return Candidate(preset, {}, recipe_from_preset(preset, **_taken(request)))


def possible(found: list[Candidate]) -> Iterator[Candidate]:
    """The candidates that the model can have."""
    return (candidate for candidate in found if candidate.refused is None)


def recipe_to_plan(request: Recipe, check: Callable[[Recipe], None]) -> Recipe:
    """The recipe whose sizes stand for a request: itself, or for "auto" the first that the model can have.

    Args:
        request: Any recipe.
        check: See `candidates`; what it says about the fallback is raised.

    Raises:
        ValueError: See `candidates`, or the model can have no candidate and no fallback.
    """
    recipe = request
    if request.preset == AUTO:
        recipe = next(possible(candidates(request, check)), fallback(request)).recipe
    check(recipe)
    return recipe


def _taken(request: Recipe) -> dict[str, Any]:
    """The fields of a request that its candidates take over; refuses others that are set."""
    taken = {name: getattr(request, name) for name in TAKEN}
    unset = Recipe(**taken)
    for field in dataclasses.fields(Recipe):
        value = getattr(request, field.name)
        if field.name not in (*TAKEN, "preset") and value != getattr(unset, field.name):
            raise ValueError(
                f"{field.name} is {value!r}, but the preset {AUTO!r} chooses the steps itself and takes only "
                f"{list(TAKEN)}. Leave it out, or name the preset that it changes."
            )
    return taken
