"""`hf-mcsmoe export`: a plain checkpoint from a mapped one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cli import options
from .compress import show_loading
from .evaluate import read_data
from .tables import before_after, print_table

if TYPE_CHECKING:
    from ..calibration import Calibration

LAYOUTS = ("native",)


def export_command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a mapped result.")],
    output: options.Output,
    layout: Annotated[str, typer.Option("--layout", help="native: a plain model of the original class.")] = "native",
    router: Annotated[
        str, typer.Option("--router", help="What becomes of the rows of a router that has more than experts.")
    ] = "dominant_rows",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the KL between both, on --data or the text that ships.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help=".txt, .jsonl, .parquet or .npy to measure the KL on; repeatable."),
    ] = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = 8,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Make a plain model of a mapped result: other runtimes load it without this package.

    Experts that are decomposed or of different widths become dense and equally wide. All layers must have the same
    number of experts; where that is less than the router has rows, the router is cut, which changes the gates.

    Example: hf-mcsmoe export qwen3-half --layout native --output qwen3-native --data held_out.jsonl
    """
    if layout not in LAYOUTS:
        raise ValueError(f"--layout is {layout!r}; a result can be exported to 'native'. Leave it out for that.")
    from ..export import export_checkpoint

    limits = {"num_samples": num_samples, "sequence_length": sequence_length, "batch_size": batch_size}
    rows = read_rows(folder, data, **limits) if measure or data else None
    report = export_checkpoint(
        folder, output, router=router, data=rows, batch_size=batch_size, overwrite=overwrite, progress=not as_json
    )
    if as_json:
        typer.echo(json.dumps(report["export"], indent=2, ensure_ascii=False))
        return
    show(report, Path(output))


def read_rows(folder: str, files: list[str] | None, **limits: Any) -> "dict[str, Calibration]":
    """Evaluation rows for the model in a folder."""
    from ..loading import load_tokenizer, read_config

    vocab_size = read_config(folder).get_text_config().vocab_size
    return read_data(files, load_tokenizer(folder), vocab_size=vocab_size, **limits)


def show(report: dict[str, Any], output: Path) -> None:
    """Print for people what was done."""
    for line in report["export"]["changes"]:
        typer.echo(f"- {line}")
    rows = [before_after("parameters", *(report[f"total_parameters_{time}"] for time in ("before", "after")))]
    rows.append(before_after("bytes", *(report[f"total_bytes_{time}"] for time in ("before", "after")), in_bytes=True))
    print_table("Against the original model", ["", "before", "after", "left"], rows)
    scores = report["export"]["against_mapped"]
    if scores is not None:
        overall = scores["overall"]
        typer.echo(
            f"KL of the mapped model to this one: {overall['kl']:.4f} nats per token, same top token: "
            f"{overall['top1_agreement']:.1%}, on {overall['tokens']:,} tokens"
        )
    elif report["export"]["is_router_cut"]:
        typer.echo("How far the result is from the mapped one was not measured; --measure does.")
    show_loading(output, "native")
