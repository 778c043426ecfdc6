"""A table of the report page, and values in its cells."""

from dataclasses import dataclass, field
from typing import Any

from .card_text import NOT_MEASURED, count


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column is text, the others are numbers unless `is_text`."""

    columns: list[str]
    rows: list[list[str]]
    is_text: bool = False
    notes: list[str] = field(default_factory=list)


def plain(value: Any) -> str:
    """A value of JSON for people."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def words(name: str) -> str:
    """A key of JSON for people."""
    return name.replace("_", " ")
