"""`hf-mcsmoe inspect`: what MoE layers a model has, from its configuration alone."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from .options import Json, Model, TrustRemoteCode
from .tables import human, human_bytes, name_pattern, print_table

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ..modeling.forms import ExpertForm
    from ..types import MoeLayer


@dataclass(frozen=True)
class StoredExperts:
    """How the experts of one layer are stored."""

    layer: "MoeLayer"  # its shapes are those of the original experts where `form` is not "dense"
    experts: "nn.Module"
    router: "nn.Module"
    num_experts: int
    parameters: int
    bytes: int
    form: str = "dense"
    mean_width: float | None = None  # neurons of an expert
    rank: int | None = None  # of decomposed experts
    kept_rows: float | None = None  # share of the rows of decomposed matrices that are kept beside the factors


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
        "sizes": asdict(measure(model, layers)),
        "layouts": possible,
        "layouts_refused": refusals,
        "moe_layers": [describe_group(group) for group in equal_layers(stored_experts(model, layers))],
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


def stored_experts(model: "PreTrainedModel", layers: "list[MoeLayer]") -> list[StoredExperts]:
    """The experts of all MoE layers, in the order of the model: those of `layers`, which are dense, and all forms."""
    from ..modeling.forms import form_layers

    dense = {
        layer.name: StoredExperts(
            layer,
            layer.experts,
            layer.router,
            layer.num_experts,
            layer.num_experts * layer.parameters_per_expert,
            layer.num_experts * layer.bytes_per_expert,
            mean_width=layer.intermediate_size,
        )
        for layer in layers
    }
    found = dense | {name: stored_form(model, experts) for name, experts in form_layers(model).items()}
    return [found[name] for name, _ in model.named_modules() if name in found]


def stored_form(model: "PreTrainedModel", experts: "ExpertForm") -> StoredExperts:
    """Experts that are not dense."""
    from ..modeling.forms.low_rank_sparse import matrix_sizes
    from ..sizes import form_sizes

    layer, layout, sizes = experts.dense_layer, experts.layout(), form_sizes(experts)
    rank, kept = layout.get("rank"), None
    if "num_rows" in layout:
        num_rows = experts.num_stored * sum(outputs for outputs, _ in matrix_sizes(layer).values())
        kept = sum(layout["num_rows"].values()) / num_rows
    neurons = layout.get("num_neurons", experts.num_stored * layer.intermediate_size)
    return StoredExperts(
        layer,
        experts,
        model.get_submodule(layer.router_name),
        experts.num_stored,
        sizes.expert_parameters,
        sizes.expert_bytes,
        form=experts.form,
        mean_width=neurons / experts.num_stored,
        rank=rank,
        kept_rows=kept,
    )


def equal_layers(stored: list[StoredExperts]) -> list[list[StoredExperts]]:
    """Layers of equal shape together; how many experts, neurons or rows are stored may differ."""
    groups: dict[tuple, list] = {}
    for one in stored:
        layer = one.layer
        kinds = (type(one.experts).__name__, type(one.router).__name__, one.rank)
        shape = (layer.num_slots, layer.top_k, layer.hidden_size, layer.intermediate_size, layer.num_router_groups)
        place = "".join(character for character in layer.name if not character.isdigit())
        groups.setdefault((*kinds, *shape, place), []).append(one)
    return list(groups.values())


def describe_group(group: list[StoredExperts]) -> dict[str, Any]:
    """What layers of equal shape have in common, and how much each stores."""
    first, layer = group[0], group[0].layer
    num_experts = sum(one.num_experts for one in group)
    return {
        "layers": len(group),
        "name": name_pattern([one.layer.name for one in group]),
        "experts_class": type(first.experts).__name__,
        "router": layer.router_name.removeprefix(f"{layer.block_name}."),
        "router_class": type(first.router).__name__,
        "num_slots": layer.num_slots,
        "num_experts": [one.num_experts for one in group],
        "top_k": layer.top_k,
        "num_router_groups": layer.num_router_groups,
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "has_gate": layer.format.has_gate,
        "has_bias": layer.format.has_bias,
        "parameters_per_expert": sum(one.parameters for one in group) // num_experts,
        "bytes_per_expert": sum(one.bytes for one in group) // num_experts,
        "form": first.form,
        "mean_widths": [one.mean_width for one in group],
        "rank": first.rank,
        "kept_rows": [one.kept_rows for one in group] if first.kept_rows is not None else None,
    }


def shape_of(group: dict[str, Any]) -> str:
    """The sizes of an expert of a group, for people."""
    shape = f"{group['hidden_size']}x{group['intermediate_size']}"
    if group["rank"] is not None:
        if group["kept_rows"] is None:
            return f"{shape}, {group['rank']} latent"
        low, high = (f"{100 * extreme(group['kept_rows']):.3g}" for extreme in (min, max))
        return f"{shape}, rank {group['rank']} + {low if low == high else f'{low}-{high}'}% rows"
    if group["form"] != "dense":
        low, high = (f"{extreme(group['mean_widths']):.4g}" for extreme in (min, max))
        return f"{group['hidden_size']}x{low if low == high else f'{low}-{high}'} of {group['intermediate_size']}"
    return shape


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
        top_k = f"{group['top_k']}{groups}"
        rows.append([group["name"], group["layers"], experts, top_k, shape_of(group), group["router"]])
    print_table("MoE layers", ["experts module", "layers", "experts", "top-k", "hidden x width", "router"], rows)
    classes = {
        f"{group['experts_class']}, routed by {group['router_class']}": None for group in described["moe_layers"]
    }
    typer.echo(f"Classes: {'; '.join(classes)}")
    typer.echo(f"Layouts: {', '.join(described['layouts']) or 'none'}")
    for reason in dict.fromkeys(described["layouts_refused"].values()):
        typer.echo(f"  {reason}")
