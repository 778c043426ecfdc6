"""`hf-mcsmoe plan`: what a recipe makes of a model, before anything is computed."""

import json
from typing import TYPE_CHECKING

import typer

from ..cli import options
from .tables import before_after, human, name_pattern, print_table

if TYPE_CHECKING:
    from ..planning import ModelPlan


def plan_command(
    model: options.Model,
    config: options.Config = None,
    preset: options.Preset = None,
    keep: options.Keep = None,
    num_experts: options.NumExperts = None,
    layout: options.Layout = None,
    allocation: options.Allocation = None,
    exclude_layer: options.ExcludeLayer = None,
    fit: options.Fit = None,
    context_length: options.ContextLength = 4096,
    rows: options.Rows = 1,
    rank: options.Rank = None,
    keep_rows: options.KeepRows = None,
    settings: options.Set = None,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what a recipe would give: parameters, bytes and FLOPs before and after. No weights are needed.

    Example: hf-mcsmoe plan Qwen/Qwen3-30B-A3B --config m-smoe --keep 0.5 --layout native
    """
    budget = {"keep": keep, "num_experts": num_experts, "allocation": allocation, "exclude_layer": exclude_layer}
    factors = {"rank": rank, "keep_rows": keep_rows, "settings": settings}
    recipe = options.build_recipe(config=config, preset=preset, layout=layout, **budget, **factors)
    from ..planning import plan

    recipe, found = options.fitted(recipe, model, fit, context_length, rows, keep, num_experts, trust_remote_code)
    result = plan(model, recipe, trust_remote_code=trust_remote_code)
    if found is not None and not as_json:
        typer.echo(str(found))
    if as_json:
        typer.echo(json.dumps({"model": model, "recipe": recipe.to_dict(), **result.to_dict()}, indent=2))
    else:
        show(result)


def show(result: "ModelPlan") -> None:
    """Print a plan for people."""
    values = result.to_dict()
    rows = [
        ("total parameters", "total_parameters", False),
        ("routed experts", "expert_parameters", False),
        ("active per token", "active_parameters", False),
        ("FLOPs per token", "flops_per_token", False),
        ("bytes", "total_bytes", True),
        ("bytes of experts", "expert_bytes", True),
    ]
    print_table(
        f"Plan, layout {result.layout}",
        ["", "before", "after", "left"],
        [before_after(label, values[f"{n}_before"], values[f"{n}_after"], is_bytes) for label, n, is_bytes in rows],
    )
    kinds: dict[tuple, list] = {}
    for layer in result.layers:
        place = "".join(character for character in layer.name if not character.isdigit())
        kinds.setdefault((place, layer.experts_before, layer.experts_after, layer.excluded), []).append(layer)
    rows = []
    for (_, before, after, excluded), layers in kinds.items():
        about = "left as it is" if excluded else f"{before} -> {after}{' on average' if layers[0].is_average else ''}"
        size = sum(layer.expert_parameters_after for layer in layers)
        rows.append([name_pattern([layer.name for layer in layers]), len(layers), about, human(size)])
    print_table("Routed experts", ["experts module", "layers", "experts", "parameters after"], rows)
    for note in result.notes:
        typer.echo(f"- {note}")
