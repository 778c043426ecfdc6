"""`hf-mcsmoe methods`: what can be done to the experts of a model, and by whom it was proposed."""

import json
from typing import Annotated

import typer

from ..registry import closest
from .options import Json
from .tables import print_table

Word = Annotated[str | None, typer.Argument(metavar="[WORD]", help="Only methods with this in name, steps or paper.")]


def methods_command(word: Word = None, as_json: Json = False) -> None:
    """Show the methods (presets): their steps, what calibration collects for them, their layouts and their papers.

    Example: hf-mcsmoe methods reap
    """
    from ..method_table import method_rows

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


def steps(row: dict) -> str:
    """Its steps, without the names of the registries."""
    return ", ".join(row["steps"].values())


def text_of(row: dict) -> str:
    """Where a word is looked for."""
    return " ".join([row["method"], *row["steps"].values(), row["paper"], *row["collects"]]).lower()
