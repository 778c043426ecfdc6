"""What page and plots both derive from the plain values of a report."""

from collections.abc import Mapping
from typing import Any


def parts_of_size(report: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((before, after) bytes of the experts of compressed layers, (before, after) of everything else)."""
    experts = tuple(sum(layer[f"bytes_{time}"] for layer in report["layers"]) for time in ("before", "after"))
    totals = (report["total_bytes_before"], report["total_bytes_after"])
    return experts, tuple(total - part for total, part in zip(totals, experts, strict=True))


def layer_numbers(report: Mapping[str, Any]) -> tuple[list[str], str]:
    """Short labels of the layers of a report, and what they are.

    The one number in which the names differ if there is one ("model.layers.3.mlp.experts" is 3), else the position.
    """
    parts = [layer["layer"].split(".") for layer in report["layers"]]
    if len({len(part) for part in parts}) == 1:
        columns = list(zip(*parts, strict=True))
        differing = [column for column in columns if len(set(column)) > 1]
        if len(parts) == 1:
            differing = [column for column in columns if column[0].isdigit()][:1]
        if len(differing) == 1 and all(part.isdigit() for part in differing[0]):
            return list(differing[0]), "decoder layer"
    return [str(position) for position in range(len(parts))], "position of the MoE layer"


def neurons_of_layers(layers: list[Mapping[str, Any]]) -> tuple[list[int], list[int]] | None:
    """Neurons of each layer's experts before and after; None if no expert was narrowed, or the report does not say."""
    widths = [(layer.get("width_before"), layer["widths"]) for layer in layers]
    if all(before is None or all(width == before for width in after) for before, after in widths):
        return None
    before = [layer["num_experts_before"] * (layer.get("width_before") or 0) for layer in layers]
    return before, [sum(layer["widths"]) for layer in layers]
