"""`hf-mcsmoe compare`: many methods on one model, side by side."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cli import options
from .evaluate import read_data
from .tables import human_bytes, print_table

if TYPE_CHECKING:
    from ..compare import ComparedResult
    from ..recipe import Recipe

RESULTS_FILE, TABLE_FILE, PLOT_FILE = "results.json", "table.md", "quality_over_bytes.png"


def compare_command(
    model: options.Model,
    output: options.Output,
    methods: Annotated[str, typer.Option("--methods", help="Presets, with commas between them; `all` for all.")],
    keep: Annotated[str, typer.Option("--keep", help="Shares of the experts that stay, with commas.")] = "0.75,0.5",
    layouts: Annotated[
        str | None, typer.Option("--layouts", help="mapped, native or both with a comma; without it each one's own.")
    ] = None,
    calibration: options.Calibration = None,
    num_samples: options.NumSamples = None,
    data: Annotated[
        list[str] | None, typer.Option("--eval", help="Text to judge on, as --calibration; repeatable.")
    ] = None,
    eval_samples: Annotated[int | None, typer.Option("--eval-samples", help="Most rows of it to use.")] = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = 8,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compress a model by several methods at several sizes from one calibration, and compare them with the original.

    Writes results.json, table.md and quality_over_bytes.png. What was finished stays: the same command goes on.

    Example: hf-mcsmoe compare allenai/OLMoE-1B-7B-0924 --methods m-smoe,reap,joint-obs --keep 0.75,0.5
    --calibration texts.jsonl --eval held_out.jsonl --output compared
    """
    from ..calibration import load_calibration
    from ..compare import compare_methods, recipes_to_compare
    from ..loading import load_model, load_tokenizer, read_config
    from ..presets import PRESETS

    names = sorted(PRESETS.keys() - {"auto"}) if methods == "all" else parts(methods)
    recipes = recipes_to_compare(names, map(float, parts(keep)), parts(layouts) if layouts else None, seed=seed)
    settings = {"model": model, "calibration": calibration, "num_samples": num_samples, "eval": data}
    settings |= {"eval_samples": eval_samples, "sequence_length": sequence_length, "dtype": dtype, "seed": seed}
    results = open_results(output, settings, overwrite)
    left = [recipe for recipe in recipes if not any(is_of(result, recipe) for result in results)]
    loading = {"trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(model, **loading)
    vocab_size = read_config(model, **loading).get_text_config().vocab_size
    reading = {"sequence_length": sequence_length, "batch_size": batch_size, "vocab_size": vocab_size}
    judged = read_data(data, tokenizer, num_samples=eval_samples, **reading)
    seen = load_calibration(calibration, tokenizer, num_samples=num_samples, seed=seed, **reading)
    original = load_model(model, dtype=dtype, device_map=device_map, **loading)

    def keep_result(result: "ComparedResult") -> None:
        results.append(result)
        write_results(output, settings, results)

    compare_methods(original, left, seen, judged, report=keep_result)
    write_tables(output, results)
    show(results)
    typer.echo(f"Written to {output}: {RESULTS_FILE}, {TABLE_FILE}, {PLOT_FILE}")


def parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def is_of(result: "ComparedResult", recipe: "Recipe") -> bool:
    """Whether a result is that of a recipe."""
    return result.recipe == json.loads(json.dumps(recipe.to_dict()))


def open_results(output: Path, settings: dict[str, Any], overwrite: bool) -> "list[ComparedResult]":
    """What an earlier run of the same comparison has finished.

    Raises:
        FileExistsError: The folder holds another comparison, or something else.
    """
    from ..compare import ComparedResult

    path = output / RESULTS_FILE
    if path.is_file() and not overwrite:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["settings"] == settings:
            return [ComparedResult(**result) for result in values["results"]]
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{str(output)!r} holds another comparison or other files. Choose another folder, or use --overwrite."
        )
    output.mkdir(parents=True, exist_ok=True)
    return []


def write_results(output: Path, settings: dict[str, Any], results: "list[ComparedResult]") -> None:
    """Write the results, in one step."""
    values = {"settings": settings, "results": [result.to_dict() for result in results]}
    temporary = output / f".{RESULTS_FILE}"
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(output / RESULTS_FILE)


def write_tables(output: Path, results: "list[ComparedResult]") -> None:
    """Write table and picture."""
    from ..compare_tables import comparison_table, plot_comparison

    (output / TABLE_FILE).write_text(comparison_table(results), encoding="utf-8")
    plot_comparison(results, output / PLOT_FILE)


def show(results: "list[ComparedResult]") -> None:
    """Print results for people, best first at each size."""
    from ..compare_tables import cells

    done = sorted((r for r in results if r.evaluation is not None), key=lambda r: (-r.keep, r.loss_increase))
    rows = [[x.method, x.layout, f"{x.keep:.0%}", human_bytes(x.expert_bytes), *cells(x, [])[4:]] for x in done]
    columns = ["method", "layout", "kept", "experts", "ppl.", "loss", "KL", "top-1", "s"]
    print_table("Comparison with the original", columns, rows)
    for result in results:
        if result.skipped is not None:
            typer.echo(f"Not done: {result.method}, {result.layout}, {result.keep:.0%}: {result.skipped}")
