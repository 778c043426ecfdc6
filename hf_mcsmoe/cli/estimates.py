"""What `plan` says about the cost of compressing: time, memory, operations and bytes of both executors."""

import dataclasses
from typing import Any

import typer

from ..recipe import Recipe
from .tables import human, human_bytes, print_table


def estimates_of(
    model: str,
    recipe: Recipe,
    *,
    num_samples: int | None,
    sequence_length: int | None,
    batch_size: int,
    gflops: float | None,
    disk: float | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """The estimates as plain values, with the data and the rates that they stand for; or why there are none."""
    from ..estimation import Workload, estimate, measure_machine
    from ..families import find_layers
    from ..loading import empty_model, read_config

    described = empty_model(
        read_config(model, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
    )
    rows = num_samples or Workload.rows
    length = sequence_length or Workload.sequence_length
    work = Workload(rows, length, min(batch_size, rows), rows // 16 if rows >= 16 else int(rows > 1))
    layer = max(find_layers(described), key=lambda one: one.num_experts)
    tokens = max(1, work.batch_tokens * layer.top_k // layer.num_slots)
    shape = (min(tokens, 4096), layer.hidden_size, layer.intermediate_size)
    rates = measure_machine(described.dtype, shape).with_said(gflops, disk)
    try:
        found = estimate(described, recipe, work, rates)
    except ValueError as error:
        return {"unknown": str(error)}
    estimates = {name: one.to_dict() for name, one in found.items()}
    return {"calibration": dataclasses.asdict(work), "rates": dataclasses.asdict(rates), **estimates}


def show_estimates(cost: dict[str, Any]) -> None:
    """Print them for people."""
    if "unknown" in cost:
        typer.echo(f"- No estimate of time and memory: {cost['unknown']}")
        return
    executors = [cost["in_memory"], cost["streaming"]]
    work, rates = cost["calibration"], cost["rates"]
    rows = [
        ["time, about", *(duration(one["seconds"]) for one in executors)],
        ["most memory, about", *(human_bytes(one["memory"]["peak"]) for one in executors)],
        ["- weights", *(human_bytes(one["memory"]["weights"]) for one in executors)],
        ["- hidden states, statistics, tokens", *(human_bytes(left_by_calibration(one)) for one in executors)],
        ["- one layer's work", *(human_bytes(one["memory"]["layer_work"]) for one in executors)],
        ["passes over the calibration data", *(str(one["passes"]) for one in executors)],
        ["bytes read", *(human_bytes(one["bytes_read"]) for one in executors)],
        ["bytes written", *(human_bytes(one["bytes_written"]) for one in executors)],
        ["FLOPs of calibration", *(human(one["calibration_flops"]) for one in executors)],
        ["FLOPs of statistics", *(human(one["statistics_flops"]) for one in executors)],
        ["FLOPs of the steps", *(human(one["steps_flops"]) for one in executors)],
    ]
    title = f"Cost with {work['rows']} rows of {work['sequence_length']} tokens, estimated"
    print_table(title, ["executor", "in_memory", "streaming"], rows)
    typer.echo(
        f"- At {rates['flops'] / 1e9:.3g} GFLOP/s ({rates['flops_float32'] / 1e9:.3g} in float32), reading "
        f"{rates['read_bytes'] / 1e6:.0f} MB/s and writing {rates['write_bytes'] / 1e6:.0f} MB/s; give the rates of "
        "another machine with --gflops and --disk. The program itself takes about 0.5 GB more."
    )
    if cost["streaming"]["impossible"] is not None:
        typer.echo(f"- Streaming is not possible: {cost['streaming']['impossible']}.")


def left_by_calibration(executor: dict[str, Any]) -> int:
    """Bytes that a forward leaves for later."""
    return sum(executor["memory"][name] for name in ("hidden_states", "statistics", "kept_tokens"))


def duration(seconds: float) -> str:
    """12 s, 3.4 min, 5.6 h."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
