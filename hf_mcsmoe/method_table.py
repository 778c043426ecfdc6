"""The table of methods: every preset, from the registries. `python -m hf_mcsmoe.method_table --write README.md`."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .auto_candidates import AUTO
from .executors.wanted import wanted_by
from .family_table import insert
from .presets import PRESETS
from .recipe import LAYOUTS, STEPS, Recipe
from .recipe_reading import recipe_from_preset

MARK = "methods"


def method_rows() -> list[dict[str, Any]]:
    """One row a preset: "method", "paper", "url", "steps", "collects", "layouts" (its own first) and "notes"."""
    return [row_of(name) for name in sorted(PRESETS)]


def row_of(name: str) -> dict[str, Any]:
    """The row of one preset."""
    preset, recipe = PRESETS[name], recipe_from_preset(name)
    return {
        "method": name,
        "paper": preset.paper,
        "url": preset.url,
        "steps": {} if name == AUTO else steps_of(recipe),
        "collects": [] if name == AUTO else collected_by(recipe),
        "layouts": sorted(layouts_of(name), key=lambda layout: layout != recipe.layout),
        "notes": preset.notes,
    }


def steps_of(recipe: Recipe) -> dict[str, str]:
    """The steps that a recipe takes, by the name of the step; importance only where something is merged."""
    steps = {step: getattr(recipe, step) for step in STEPS if getattr(recipe, step) is not None}
    if recipe.merging is None:
        steps.pop("importance", None)
    if recipe.sequential:
        steps["order"] = "sequential"
    if recipe.targets is not None:
        steps["targets"] = recipe.targets
    return steps


def collected_by(recipe: Recipe) -> list[str]:
    """What calibration collects for a recipe."""
    wanted = wanted_by(recipe)
    return [*sorted(wanted.statistics), *(["tokens"] if wanted.keeps_tokens else [])]


def layouts_of(name: str) -> list[str]:
    """The layouts that a preset can have; a model may rule one out."""
    possible = []
    for layout in LAYOUTS:
        try:
            recipe_from_preset(name, layout=layout)
        except ValueError:
            continue
        possible.append(layout)
    return possible


def part_rows() -> list[dict[str, Any]]:
    """One row for each part that a recipe may name: "step", "name", "options", "collects" and what it does."""
    rows = []
    for step, registry in STEPS.items():
        for name in registry if step != "importance" else ():  # the same as saliency
            needs = sorted(registry.needs(name)) + (["tokens"] if "tokens" in registry.asks_for(name) else [])
            what = (inspect.getdoc(registry[name]) or "").partition("\n")[0]
            row = {"step": step, "name": name, "options": registry.options(name), "collects": needs, "what": what}
            rows.append(row)
    return rows


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = ["| method | steps | collects | layouts | notes |", "|---|---|---|---|---|"]
    for row in rows:
        steps = ", ".join(f"{step} `{name}`" for step, name in row["steps"].items())
        collects = ", ".join(f"`{name}`" for name in row["collects"])
        notes = f"[{row['paper']}]({row['url']}). {row['notes']}"
        lines.append(f"| `{row['method']}` | {steps} | {collects} | {', '.join(row['layouts'])} | {notes} |")
    return "\n".join([f"{len(rows)} methods.", "", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    """Put the table into a README."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", type=Path, metavar="README", required=True)
    path = parser.parse_args(arguments).write
    path.write_text(insert(path.read_text(encoding="utf-8"), render(method_rows()), MARK), encoding="utf-8")


if __name__ == "__main__":
    main()
