"""`hf-mcsmoe recover`: train a compressed model with its original as the teacher."""

from typing import Annotated, Any

import typer

from . import options
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
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Recover a compressed model by distillation, and write it with its reports and model card.

    Every field of TrainingArguments and DistillationArguments is an option too, after DIR: --learning-rate 3e-5
    --num-train-epochs 2 --distillation-weight 2 --bf16. They change those of --config. Several devices: torchrun
    --nproc-per-node 2 -m hf_mcsmoe recover ...

    Example: hf-mcsmoe recover qwen3-half --teacher Qwen/Qwen3-30B-A3B --data texts.jsonl --output qwen3-half-recovered
    """
    values = training_values(config, context.args)
    if teacher is not None:
        values["teacher"] = teacher
    from ..training.recovery import recover_checkpoint

    limits = {"num_samples": num_samples, "sequence_length": sequence_length}
    report = recover_checkpoint(folder, output, values, data=data, resume=resume, overwrite=overwrite, **limits)
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
