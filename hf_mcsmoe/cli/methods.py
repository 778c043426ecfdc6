"""`hf-mcsmoe methods`: what can be done to the experts of a model, and by whom it was proposed."""

import json
from typing import Annotated

import typer

from ..registry import closest
from .options import Json
from .tables import print_table

Word = Annotated[str | None, typer.Argument(metavar="[WORD]", help="Only methods with this in name, steps or paper.")]


def methods_command(
    word: Word = None,
    parts: Annotated[bool, typer.Option("--parts", help="Show the parts that recipes are made of instead.")] = False,
    as_json: Json = False,
) -> None:
    """Show the methods (presets): their steps, what calibration collects for them, their layouts and their papers.

    Example: hf-mcsmoe methods reap
    """
    from ..method_table import method_rows

    if parts:
        show_parts(word, as_json)
        return
    table = method_rows()
    rows = [row for row in table if word is None or word.lower() in text_of(row)]
    if not rows:
        near = closest(word, [row["method"] for row in table])
        raise ValueError(f"No method has {word!r} in its name, steps or paper.{near} Leave it out to see all.")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    listed = [[row["method"], *(", ".join(row[key]) for key in ("layouts", "collects")), steps(row)] for row in rows]
    columns = ["method", "layouts", "collects", "steps"]
    print_table(f"{len(rows)} of {len(table)} methods", columns, listed, are_numbers=False)
    for row in rows if word is not None else []:
        typer.echo(f"\n{row['method']}: {row['paper']}, {row['url']}\n{row['notes']}")


def show_parts(word: str | None, as_json: bool) -> None:
    """Print the parts of every step, or those with a word in step or name."""
    from ..method_table import part_rows

    rows = [row for row in part_rows() if word is None or word.lower() in f"{row['step']} {row['name']}"]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, default=str))
        return
    listed = [[row["step"], row["name"], ", ".join(row["options"]), row["what"]] for row in rows]
    print_table(f"{len(rows)} parts", ["step", "name", "options", "what it does"], listed, are_numbers=False)


def steps(row: dict) -> str:
    """Its steps, without the names of the registries."""
    return ", ".join(row["steps"].values())


def text_of(row: dict) -> str:
    """Where a word is looked for."""
    return " ".join([row["method"], *row["steps"].values(), row["paper"], *row["collects"]]).lower()
