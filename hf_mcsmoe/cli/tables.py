"""Numbers and tables for people."""

import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def human(number: float, units: Sequence[tuple[float, str]] = UNITS) -> str:
    """Three significant digits and a unit: 1.98 B, 733 M, 12.3 k, 512."""
    for size, unit in units:
        if abs(number) >= size * 0.9995:
            value = number / size
            digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
            return f"{value:.{digits}f} {unit}"
    return f"{number:.0f}"


def human_bytes(number: int) -> str:
    """Bytes in powers of ten: 61.1 GB, 5.20 MB, 512 B."""
    text = human(number, BYTE_UNITS)
    return text if text.endswith("B") else f"{text} B"


def before_after(label: str, before: int, after: int, in_bytes: bool = False) -> list[str]:
    """A row: label, before, after, and the share that is left."""
    write = human_bytes if in_bytes else human
    return [label, write(before), write(after), f"{after / before:.1%}" if before else "-"]


def span(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges: 0-3,5,7-8."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def name_pattern(names: Sequence[str]) -> str:
    """Names that differ in one number as one pattern: model.layers.{0-47}.mlp.experts; else the first of them."""
    numbers = [tuple(map(int, re.findall(r"\d+", name))) for name in names]
    template = re.sub(r"\d+", "{}", names[0])
    if any(re.sub(r"\d+", "{}", name) != template for name in names):
        return f"{names[0]} and {len(names) - 1} more"
    columns = [set(column) for column in zip(*numbers, strict=True)]
    if sum(len(column) > 1 for column in columns) > 1:
        return f"{names[0]} and {len(names) - 1} more"
    return template.format(*(f"{{{span(c)}}}" if len(c) > 1 else str(*c) for c in columns))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, are_numbers: bool = True
) -> None:
    """Print a table on stdout; the first column is text, the others are numbers, or text too."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for position, column in enumerate(columns):
        is_first = position == 0
        table.add_column(
            column, justify="left" if is_first or not are_numbers else "right", overflow="fold", no_wrap=is_first
        )
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(markup=False, highlight=False)
    console.print(table)
