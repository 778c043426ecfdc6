"""`hf-mcsmoe plan`: what a recipe makes of a model, before anything is computed."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..cli import options
from .tables import before_after, human, name_pattern, print_table

if TYPE_CHECKING:
    from ..model_plan import ModelPlan


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
    context_length: options.ContextLength = None,
    rows: options.Rows = None,
    rank: options.Rank = None,
    keep_rows: options.KeepRows = None,
    settings: options.Set = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = 8,
    gflops: Annotated[
        float | None, typer.Option("--gflops", help="GFLOP/s that time is estimated with; else measured here.")
    ] = None,
    disk: Annotated[
        float | None, typer.Option("--disk", help="MB/s of the disk that time is estimated with; else measured here.")
    ] = None,
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what a recipe would give, and what compressing would take of time and memory. No weights are needed.

    The time is an estimate: operations and bytes over what this machine does in a second, measured in less than one.

    Example: hf-mcsmoe plan Qwen/Qwen3-30B-A3B --config m-smoe --keep 0.5 --layout native
    """
    budget = {"keep": keep, "num_experts": num_experts, "allocation": allocation, "exclude_layer": exclude_layer}
    factors = {"rank": rank, "keep_rows": keep_rows, "fit": fit, "context_length": context_length, "rows": rows}
    factors |= {"settings": settings}
    recipe = options.build_recipe(config=config, preset=preset, layout=layout, **budget, **factors)
    from ..planning import plan

    recipe, found = options.fitted(recipe, model, trust_remote_code)
    result = plan(model, recipe, trust_remote_code=trust_remote_code)
    from .estimates import estimates_of, show_estimates

    reading = {"num_samples": num_samples, "sequence_length": sequence_length, "batch_size": batch_size}
    how = {"gflops": gflops, "disk": disk, "trust_remote_code": trust_remote_code}
    cost = estimates_of(model, recipe, **reading, **how)
    if as_json:
        values = {"model": model, "recipe": recipe.to_dict(), **result.to_dict(), "cost": cost}
        typer.echo(json.dumps(values, indent=2))
        return
    if found is not None:
        typer.echo(str(found))
    show(result)
    show_estimates(cost)


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
