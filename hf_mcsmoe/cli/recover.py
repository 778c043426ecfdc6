"""`hf-mcsmoe recover`: train a compressed model with its original as the teacher."""

from typing import Annotated, Any

import typer

from ..cli import options
from .compress import show_loading
from .tables import print_table
from .training_options import training_values

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help=".txt, .jsonl, .parquet, .npy or a folder of datasets; rows of text, of input and target for encoder-"
        "decoder models, of text and label for classifiers; without it the text that ships.",
    ),
]


def recover_command(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of the compressed model.")],
    output: options.Output,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="The original model, or a file of cache-teacher.")
    ] = None,
    data: Data = None,
    config: Annotated[
        str | None, typer.Option("--config", help="YAML file of training arguments, as HfArgumentParser reads it.")
    ] = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    final_keep_rows: Annotated[
        float | None,
        typer.Option(
            "--final-keep-rows",
            help="Prune the rows of decomposed experts to this share while training (paper: 0.1); dense experts are "
            "decomposed first, with --rank.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Of the factors, with --final-keep-rows and dense experts; else 32.")
    ] = None,
    initial_warmup: Annotated[
        float, typer.Option("--initial-warmup", help="First steps, or share of all steps, in which all rows stay.")
    ] = 0.04,
    final_warmup: Annotated[
        float, typer.Option("--final-warmup", help="Last steps, or share of them, in which the rows are settled.")
    ] = 0.16,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Recover a compressed model by distillation, and write it with its reports and model card.

    Every field of TrainingArguments and DistillationArguments is an option too, after DIR: --learning-rate 3e-5
    --num-train-epochs 2 --distillation-weight 2 --bf16. They change those of --config. Several devices: torchrun
    --nproc-per-node 2 -m hf_mcsmoe recover ...

    Router KD, which trains the routers alone: --only-routers --task-weight 0 --temperature 1 --learning-rate 5e-5.

    MC-SMoE in three commands: compress --preset m-smoe, recover, and recover --final-keep-rows 0.1 of what that gave.

    Example: hf-mcsmoe recover qwen3-half --teacher Qwen/Qwen3-30B-A3B --data texts.jsonl --output qwen3-half-recovered
    """
    values = training_values(config, context.args)
    if teacher is not None:
        values["teacher"] = teacher
    if final_keep_rows is None and rank is not None:
        raise ValueError(
            f"--rank is {rank}, but experts are decomposed for --final-keep-rows only. Give it as well, e.g. 0.1."
        )
    from ..training.recovery import recover_checkpoint
    from ..training.recovery_pruning import RowPruning

    pruning = None
    if final_keep_rows is not None:
        pruning = RowPruning(final_keep_rows, rank, initial_warmup, final_warmup)
    limits = {"num_samples": num_samples, "sequence_length": sequence_length}
    how = {"pruning": pruning, "resume": resume, "overwrite": overwrite}
    report = recover_checkpoint(folder, output, values, data=data, **limits, **how)
    if report is not None:
        show(report)
        show_loading(output, "mapped" if (output / "modeling_hf_mcsmoe.py").is_file() else "native")


def show(report: dict[str, Any]) -> None:
    """Print losses before and after."""
    labels = {"loss_task": "loss (nats)", "kl": "KL to the teacher (nats, at the temperature)", "loss": "objective"}
    before, after = report["held_out_before"], report["held_out_after"]
    rows = [[label, f"{before[name]:.4f}", f"{after[name]:.4f}"] for name, label in labels.items() if name in before]
    seconds = f"{report['steps']} steps, {report['seconds_of_last_run']:.0f} s"
    print_table(f"Recovered in {seconds}; held-out text", ["per token", "before", "after"], rows)
    pruned = report.get("row_pruning")
    if pruned is not None:
        share = pruned["kept_rows"] / pruned["rows"]
        typer.echo(f"Experts: factors of rank {pruned['rank']}, {pruned['kept_rows']:,} rows kept ({share:.1%})")
