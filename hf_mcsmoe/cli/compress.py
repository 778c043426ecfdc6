"""`hf-mcsmoe compress`: a smaller checkpoint from a model and a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..cli import options
from .tables import before_after, human, human_bytes, print_table
from .together import together

if TYPE_CHECKING:
    from ..executors.streaming_summary import StreamingSummary
    from ..model_plan import ModelPlan
    from ..types import CompressionReport, Trial


def compress_command(
    model: options.Model,
    output: options.Output,
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
    calibration: options.Calibration = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = 8,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    seed: options.Seed = None,
    overwrite: options.Overwrite = False,
    executor: Annotated[
        str,
        typer.Option(
            "--executor",
            help="auto: layer by layer from the disk, unless --device-map is given or it cannot be; or in_memory.",
        ),
    ] = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compress the experts of a model, and write checkpoint, tokenizer, report with plots, recipe and card.

    Example: hf-mcsmoe compress Qwen/Qwen3-30B-A3B --output out --keep 0.5 --calibration texts.jsonl
    """
    budget = {"keep": keep, "num_experts": num_experts, "allocation": allocation, "exclude_layer": exclude_layer}
    factors = {"rank": rank, "keep_rows": keep_rows, "fit": fit, "context_length": context_length, "rows": rows}
    factors |= {"settings": settings}
    recipe = options.build_recipe(config=config, preset=preset, layout=layout, seed=seed, **budget, **factors)
    from ..compress import compress_moe
    from ..planning import plan

    with together():
        resolved, found = options.fitted(recipe, model, trust_remote_code, dtype)
        if found is not None:
            typer.echo(str(found))
        show_plan(plan(model, resolved, trust_remote_code=trust_remote_code))
        result = compress_moe(
            model,
            recipe,
            calibration=calibration,
            output_dir=output,
            num_samples=num_samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            overwrite=overwrite,
            dtype=dtype,
            device_map=device_map,
            executor=executor,
            trust_remote_code=trust_remote_code,
        )
        show(result.compression_report)
        if hasattr(result, "streaming_summary"):
            show_streaming(result.streaming_summary)
        show_loading(output, recipe.layout)
        typer.echo(f"Report with plots: {output / 'compression_report.html'}")


def show_plan(planned: "ModelPlan") -> None:
    """Print in one line what is about to be made."""
    typer.echo(
        f"Plan: {human(planned.total_parameters_before)} -> {human(planned.total_parameters_after)} parameters, "
        f"{human_bytes(planned.total_bytes_before)} -> {human_bytes(planned.total_bytes_after)}"
    )


def show(report: "CompressionReport") -> None:
    """Print a report for people."""
    totals = [("total parameters", "total_parameters", False), ("bytes", "total_bytes", True)]
    print_table(
        f"Compressed in {report.seconds:.0f} s",
        ["", "before", "after", "left"],
        [
            before_after(label, getattr(report, f"{name}_before"), getattr(report, f"{name}_after"), is_bytes)
            for label, name, is_bytes in totals
        ],
    )
    rows = []
    for layer in report.layers:
        error = "-" if layer.relative_error is None else f"{layer.relative_error:.2%}"
        experts = f"{layer.num_experts_before} -> {layer.num_experts_after}"
        rows.append([layer.layer, experts, human_bytes(layer.bytes_after), error])
    print_table("Layers", ["experts module", "experts", "bytes after", "error on held-out tokens"], rows)
    if report.tried:
        show_trials(report.tried)
    for warning in report.warnings:
        typer.echo(f"- {warning}")


def show_streaming(summary: "StreamingSummary") -> None:
    """Print in one line what streaming took."""
    resumed = f", {summary.resumed_visits} visits of layers were done before" if summary.resumed_visits else ""
    typer.echo(
        f"Streamed {summary.num_decoder_layers} decoder layers on {summary.device}, passes: {summary.passes}, "
        f"read {human_bytes(summary.bytes_read)}, wrote {human_bytes(summary.bytes_written)}{resumed}"
    )


def show_trials(trials: list["Trial"]) -> None:
    """Print what the preset "auto" tried."""
    rows = []
    for trial in trials:
        numbers = ["-"] * 3
        if trial.skipped is None:
            numbers = [f"{trial.kl:.4f}", f"{trial.loss_increase:+.4f}", f"{trial.seconds:.0f}"]
        rows.append([trial.label, *numbers, "yes" if trial.is_chosen else ""])
    print_table("Recipes tried, on held-out tokens", ["recipe", "KL", "loss increase", "seconds", "chosen"], rows)
    for trial in trials:
        if trial.skipped is not None:
            typer.echo(f"- {trial.label} was skipped: {trial.skipped}")


def show_loading(folder: Path, layout: str) -> None:
    """Print how to load a result."""
    from ..loading import auto_class_of, native_class, read_config

    config = read_config(folder)
    loader = auto_class_of(config) or native_class(config)
    typer.echo(f"Written to {folder}: {human_bytes(bytes_of_weights(folder))} of weights. To load it:")
    if layout == "mapped":
        typer.echo("    import hf_mcsmoe")
    typer.echo(f'    model = transformers.{loader.__name__}.from_pretrained("{folder}")')


def bytes_of_weights(folder: Path) -> int:
    """Size of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
