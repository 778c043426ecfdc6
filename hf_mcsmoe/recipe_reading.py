"""Recipes from what users write: a preset and changes to it, plain containers, a YAML file."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .presets import PRESETS
from .recipe import Recipe
from .registry import closest

RECIPE_FIELDS = frozenset(f.name for f in dataclasses.fields(Recipe))


def recipe_from_preset(preset: str, **changes: Any) -> Recipe:
    """The recipe of a preset with some fields changed.

    Raises:
        ValueError: Unknown preset or field (with the closest match), or a value that is not allowed.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown preset {preset!r}; choose one of {sorted(PRESETS)}.{closest(preset, PRESETS)}")
    check_fields(changes)
    recipe = Recipe(**{**PRESETS[preset].recipe, **changes})
    object.__setattr__(recipe, "preset", preset)
    return recipe


def check_fields(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that is no field of `Recipe`."""
    for name in values:
        if name not in RECIPE_FIELDS:
            raise ValueError(
                f"A recipe has no field {name!r}; it has {sorted(RECIPE_FIELDS)}.{closest(name, RECIPE_FIELDS)}"
            )


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain containers; with "preset", the other keys change that preset.

    Raises:
        ValueError: Unknown preset or field, or a value that is not allowed.
        TypeError: `values` is not a mapping.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"A recipe is a mapping of fields, got {type(values).__name__}. See `Recipe` for the fields.")
    check_fields(values)
    if values.get("preset") is not None:
        return recipe_from_preset(**values)
    return Recipe(**{name: value for name, value in values.items() if name != "preset"})


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Plain containers from which `recipe_from_dict` gives the recipe back, whatever defaults a later version has.

    Every field that decides something is there, also where it is the default of today.
    """
    preset = PRESETS[recipe.preset].recipe if recipe.preset in PRESETS else {}
    said: dict[str, Any] = {"preset": None} if recipe.preset else {}
    for one in dataclasses.fields(Recipe):
        value = getattr(recipe, one.name)
        value = list(value) if isinstance(value, tuple) else value
        is_empty = value in ({}, []) or (value is None and one.default is None)
        if not is_empty or one.name in preset:
            said[one.name] = value
    return said


def recipe_from_yaml(path: str | Path) -> Recipe:
    """A recipe from a YAML file; unknown keys are refused.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not YAML, or not a valid recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No recipe file {str(path)!r}. Give the path of a YAML file or a preset: {sorted(PRESETS)}."
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not valid YAML: {error}") from error
    return recipe_from_dict(values or {})
