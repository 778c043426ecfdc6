"""The table of families: what the code finds in a tiny model of each, kept as data, and its rendering.

Building a model of every family takes a while, so the answers are kept in `families/table.json`; a test asks the
code again. Make it anew with
`python -m hf_mcsmoe.family_table --measure tests/data/tiny_configs.json --write README.md`.
"""

import argparse
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .families import find_layers, reason_against, tied_layers
from .families.names import NUM_EXPERTS_NAMES, read_attribute
from .types import MoeLayer

TABLE = Path(__file__).parent / "families" / "table.json"
MARK = "families"
LAYOUTS = ("mapped", "native")


def read_table() -> list[dict[str, Any]]:
    """The rows of the table: "family", "model_types", "classes", "count_fields", "layouts", "notes"."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def describe_family(models: Sequence[PreTrainedModel]) -> dict[str, Any]:
    """One row, from models of the family on any device (meta is enough): what the code finds in them.

    Args:
        models: One of each class of the family that has experts.
    """
    layers = [find_layers(model) for model in models]
    flat = [layer for found in layers for layer in found]
    layouts = [name for name in LAYOUTS if flat and all(name in layer.family.layouts for layer in flat)]
    notes = sorted({note for found in layers for note in notes_on(found)})
    reasons = [reason.partition(": ")[2] for model in models if (reason := reason_against(model))]
    refusals = sorted({f"not native: {x.family.not_native_because}" for x in flat if x.family.not_native_because})
    return {
        "family": type(models[0]).__module__.split(".")[-2],
        "model_types": [model.config.model_type or type(model).__name__ for model in models],
        "classes": [type(model).__name__ for model in models],
        "count_fields": sorted({field for model in models for field in count_fields(model.config)}),
        "layouts": layouts,
        "notes": notes + (refusals or (reasons[:1] if not flat else [])),
    }


def notes_on(layers: Sequence[MoeLayer]) -> Iterator[str]:
    """What is special about the MoE layers of one model."""
    tied = tied_layers(layers)
    places = {re.sub(r"\d+", "*", layer.name) for layer in layers if layer.name not in tied}
    if len(places) > 1:
        yield f"{len(places)} sets of layers, to be chosen by name"
    if tied:
        yield "encoder and decoder share experts"
    for layer in layers:
        flags = {
            "no gate": not layer.format.has_gate,
            "biases": layer.format.has_bias,
            "transposed": layer.format.is_transposed,
            "gate and up interleaved": layer.format.is_interleaved,
            "group-limited router": layer.num_router_groups > 1,
            "identity experts": layer.num_identity_slots > 0,
            "router rows beside those of the experts": layer.num_passive_rows > layer.num_identity_slots,
            "hash router": bool(layer.family.expert_tables(layer)),
        }
        yield from (text for text, holds in flags.items() if holds)


def count_fields(config: PreTrainedConfig, prefix: str = "") -> Iterator[str]:
    """Where a configuration says how many experts there are, e.g. "text_config.num_experts"."""
    for name in NUM_EXPERTS_NAMES:
        is_stored = name in vars(config) and name not in (config.attribute_map or {})
        if is_stored and (read_attribute((name,), config) or 0) > 1:
            yield prefix + name
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from count_fields(value, f"{prefix}{name}.")


def measure_table(configurations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, from tiny configurations: {key: {"config": "module:class", "model": ..., "kwargs": {...}}}."""
    families: dict[str, list[PreTrainedModel]] = {}
    for entry in configurations.values():
        config_class, model_class = (_named(entry[name]) for name in ("config", "model"))
        with torch.device("meta"):
            model = model_class(config_class(**entry["kwargs"]))
        families.setdefault(model_class.__module__, []).append(model)
    return sorted((describe_family(models) for models in families.values()), key=lambda row: row["family"])


def _named(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = ["| family | model types | layouts | experts counted by | notes |", "|---|---|---|---|---|"]
    for row in rows:
        types, fields = (", ".join(f"`{name}`" for name in row[key]) for key in ("model_types", "count_fields"))
        layouts = ", ".join(row["layouts"]) or "none"
        lines.append(f"| {row['family']} | {types} | {layouts} | {fields} | {'; '.join(row['notes'])} |")
    supported = sum(bool(row["layouts"]) for row in rows)
    native = sum("native" in row["layouts"] for row in rows)
    head = f"{supported} of {len(rows)} families of transformers: {supported} mapped, {native} also native."
    return "\n".join([head, "", *lines])


def insert(text: str, table: str, mark: str = MARK) -> str:
    """`text` with `table` between the comments of `mark`; they are added at the end where there are none."""
    start, end = f"<!-- {mark}:start -->", f"<!-- {mark}:end -->"
    if start not in text or end not in text:
        text = f"{text.rstrip()}\n\n{start}\n{end}\n"
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the table anew and put it into a README."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--measure", type=Path, metavar="JSON", help="Ask the code again, with these configurations.")
    parser.add_argument("--write", type=Path, metavar="README", help="Put the table between the markers of this file.")
    options = parser.parse_args(arguments)
    if options.measure is not None:
        rows = measure_table(json.loads(options.measure.read_text(encoding="utf-8")))
        body = ",\n".join(f" {json.dumps(row)}" for row in rows)
        TABLE.write_text(f"[\n{body}\n]\n", encoding="utf-8")
    if options.write is not None:
        text = insert(options.write.read_text(encoding="utf-8"), render(read_table()))
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
