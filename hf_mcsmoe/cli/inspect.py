"""`hf-mcsmoe inspect`: what MoE layers a model has, from its configuration alone."""

import json
from typing import TYPE_CHECKING, Any

import typer

from .options import Json, Model, TrustRemoteCode
from .tables import human, human_bytes, name_pattern, print_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..types import MoeLayer


def inspect_command(model: Model, as_json: Json = False, trust_remote_code: TrustRemoteCode = False) -> None:
    """Show the MoE layers of a model, its size, and the layouts it can be compressed to.

    Only the configuration is read: no weights are needed, and a model of 500 B parameters takes seconds.

    Example: hf-mcsmoe inspect Qwen/Qwen3-30B-A3B
    """
    from ..loading import empty_model, read_config

    config = read_config(model, trust_remote_code=trust_remote_code)
    described = describe(model, empty_model(config, trust_remote_code=trust_remote_code))
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        show(described)


def describe(source: str, model: "PreTrainedModel") -> dict[str, Any]:
    """What `inspect` shows, ready for JSON."""
    import dataclasses

    from ..families import find_layers
    from ..sizes import measure

    layers = find_layers(model)
    layout = getattr(model.config, "merged_sparse_moe", None)
    possible, refusals = layouts_of(model, layers)
    return {
        "model": source,
        "model_type": model.config.model_type,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compressed": layout is not None,
        "recipe": layout["recipe"] if layout is not None else None,
        "sizes": dataclasses.asdict(measure(model, layers)),
        "layouts": possible,
        "layouts_refused": refusals,
        "moe_layers": [describe_group(group) for group in equal_layers(layers)],
    }


def layouts_of(model: "PreTrainedModel", layers: "list[MoeLayer]") -> tuple[list[str], dict[str, str]]:
    """(layouts that the model can be compressed to, why not the others)."""
    from ..layouts import check_layout
    from ..recipe import LAYOUTS, Recipe

    possible, refusals = [], {}
    for layout in LAYOUTS:
        try:
            check_layout(layers, Recipe(keep=1.0, layout=layout), model=model)
            possible.append(layout)
        except ValueError as error:
            refusals[layout] = str(error)
    return possible, refusals


def equal_layers(layers: "list[MoeLayer]") -> "list[list[MoeLayer]]":
    """Layers of equal shape together; how many experts are stored may differ."""
    groups: dict[tuple, list] = {}
    for layer in layers:
        kinds = (type(layer.experts).__name__, type(layer.router).__name__)
        shape = (layer.num_slots, layer.top_k, layer.hidden_size, layer.intermediate_size, layer.num_router_groups)
        place = "".join(character for character in layer.name if not character.isdigit())
        groups.setdefault((*kinds, *shape, place), []).append(layer)
    return list(groups.values())


def describe_group(group: "list[MoeLayer]") -> dict[str, Any]:
    """What layers of equal shape have in common, and how many experts each stores."""
    first = group[0]
    return {
        "layers": len(group),
        "name": name_pattern([layer.name for layer in group]),
        "experts_class": type(first.experts).__name__,
        "router": first.router_name.removeprefix(f"{first.block_name}."),
        "router_class": type(first.router).__name__,
        "num_slots": first.num_slots,
        "num_experts": [layer.num_experts for layer in group],
        "top_k": first.top_k,
        "num_router_groups": first.num_router_groups,
        "hidden_size": first.hidden_size,
        "intermediate_size": first.intermediate_size,
        "has_gate": first.format.has_gate,
        "has_bias": first.format.has_bias,
        "parameters_per_expert": first.parameters_per_expert,
        "bytes_per_expert": first.bytes_per_expert,
    }


def show(described: dict[str, Any]) -> None:
    """Print what `describe` found, for people."""
    sizes = described["sizes"]
    state = " (compressed, mapped layout)" if described["compressed"] else ""
    typer.echo(f"{described['model']}: {described['architecture']}, {described['dtype']}{state}")
    print_table(
        "Size",
        ["", "parameters", "bytes"],
        [
            ["total", human(sizes["total_parameters"]), human_bytes(sizes["total_bytes"])],
            ["routed experts", human(sizes["expert_parameters"]), human_bytes(sizes["expert_bytes"])],
            ["active per token", human(sizes["active_parameters"]), "-"],
        ],
    )
    if not described["moe_layers"]:
        typer.echo(described["layouts_refused"]["mapped"])
        return
    rows = []
    for group in described["moe_layers"]:
        stored = sorted(set(group["num_experts"]))
        experts = str(stored[0]) if len(stored) == 1 else f"{stored[0]}-{stored[-1]}"
        if stored != [group["num_slots"]]:
            experts = f"{experts} of {group['num_slots']}"
        groups = f" in {group['num_router_groups']} groups" if group["num_router_groups"] > 1 else ""
        shape = f"{group['hidden_size']}x{group['intermediate_size']}"
        rows.append([group["name"], group["layers"], experts, f"{group['top_k']}{groups}", shape, group["router"]])
    print_table("MoE layers", ["experts module", "layers", "experts", "top-k", "hidden x width", "router"], rows)
    classes = {
        f"{group['experts_class']}, routed by {group['router_class']}": None for group in described["moe_layers"]
    }
    typer.echo(f"Classes: {'; '.join(classes)}")
    typer.echo(f"Layouts: {', '.join(described['layouts']) or 'none'}")
    for reason in dict.fromkeys(described["layouts_refused"].values()):
        typer.echo(f"  {reason}")
