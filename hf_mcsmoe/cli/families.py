"""`hf-mcsmoe families`: which kinds of models can be compressed, and how."""

import json
from typing import Annotated

import typer

from ..registry import closest
from .options import Json
from .tables import print_table

Word = Annotated[str | None, typer.Argument(metavar="[WORD]", help="Only families with this in their names.")]


def families_command(word: Word = None, as_json: Json = False) -> None:
    """Show the families of Mixture-of-Experts models of transformers, their layouts, and what is special about them.

    Example: hf-mcsmoe families qwen
    """
    from ..family_table import read_table

    table = read_table()
    rows = [row for row in table if word is None or any(word in name for name in names_of(row))]
    if not rows:
        names = [name for row in table for name in names_of(row)]
        raise ValueError(f"No family has {word!r} in its names.{closest(word, names)} Leave it out to see all.")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    print_table(
        f"{len(rows)} of {len(table)} families",
        ["family", "layouts", "notes"],
        [[row["family"], ", ".join(row["layouts"]) or "none", "; ".join(row["notes"])] for row in rows],
        are_numbers=False,
    )


def names_of(row: dict) -> list[str]:
    """All names that a family goes by."""
    return [row["family"], *row["model_types"], *row["classes"]]
