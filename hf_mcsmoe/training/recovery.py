"""Recovering a checkpoint: from a folder to a folder, continued where an earlier run stopped."""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..checkpoint import check_output_folder
from ..loading import empty_model, load_model, load_tokenizer, read_config
from ..local_paths import hub_id
from ..outcome import package_version
from ..publishing import (
    REPORT_FILE,
    read_report,
    read_statistics,
    write_card,
    write_pages,
    write_report,
    write_statistics,
)
from .arguments import DistillationArguments
from .cached_teacher import read_description
from .live_teacher import is_cache_file
from .recovery_data import RecoveryData, RowCollator, load_recovery_data
from .recovery_pruning import RowPruning, report_sizes
from .targets import Task, task_of
from .trainer import DistillationTrainer

RECOVERY_FILE = "recovery_report.json"
RUN_FILE = "run.json"
FORMAT_VERSION = 1
# A small recovery on one device. Decay and the second moment are MC-SMoE's (betas 0.9 and 0.98, eps 1e-6, decay
# 0.01); short runs need the shorter memory of the second moment.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # share of all steps
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 1,
    "report_to": "none",
}


def recovery_arguments(values: Mapping[str, Any], output_dir: str | Path) -> DistillationArguments:
    """`DEFAULTS` with `values` in their place; bfloat16 autocast where the device has it and nothing else is asked."""
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    precision = {} if {"bf16", "fp16"} & set(values) else {"bf16": has_bf16}
    return DistillationArguments(**{**DEFAULTS, **precision, **values, "output_dir": str(output_dir)})


def working_folder(output: Path) -> Path:
    """Where the checkpoints of an unfinished recovery are: beside its output."""
    return output.absolute().with_name(f".{output.name}.recovery")


def recover_checkpoint(
    folder: str | Path,
    output: str | Path,
    values: Mapping[str, Any],
    *,
    data: str | Path | None = None,
    num_samples: int | None = None,
    sequence_length: int | None = None,
    pruning: RowPruning | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a compressed model with its teacher, and write it with tokenizer, reports and model card.

    The weights are float32 while they are trained. Afterwards they are rounded to the dtypes they had, and the result
    is measured as it is written. The folder appears when it is complete; until then its checkpoints are in
    `working_folder`, which goes when all is done.

    Args:
        folder: Folder or Hub id of the compressed model.
        output: Folder of the result.
        values: Fields of `DistillationArguments` that differ from `DEFAULTS`, "teacher" among them.
        data: See `load_recovery_data`.
        num_samples: See there.
        sequence_length: See there.
        pruning: Decompose the experts unless they are, and prune their rows while they are trained; None trains the
            model as it is.
        resume: Continue an interrupted run with the same arguments from its last checkpoint; start if there is none.
        overwrite: Replace a folder that is not empty, and forget an interrupted run.

    Returns:
        What `recovery_report.json` holds.

    Raises:
        FileExistsError: The output, or an interrupted run, is in the way.
        ValueError: No teacher, a model whose rows cannot be pruned, or another model, teacher, data or arguments than
            those of the run to resume.
    """
    output = Path(output)
    if not values.get("teacher"):
        raise ValueError("There is no teacher. Give --teacher: the original model, or a file of cache-teacher.")
    check_output_folder(output, overwrite)
    work = working_folder(output)
    args = recovery_arguments(values, work)
    task, tokenizer = checkpoint_task(folder), load_tokenizer(folder)
    _check_teacher(values["teacher"])
    if pruning is not None:
        pruning.check(empty_model(read_config(folder)))
    vocab_size = read_config(folder).get_text_config().vocab_size
    limits = {"num_samples": num_samples, "sequence_length": sequence_length, "vocab_size": vocab_size}
    rows = load_recovery_data(data, tokenizer, task, **limits)
    asked = {"model": str(folder), "values": dict(values), "data": rows.fingerprint()}
    asked["row_pruning"] = dataclasses.asdict(pruning) if pruning is not None else None
    with args.main_process_first(desc="preparing the folder"):
        if args.process_index == 0:
            _prepare_folder(work, asked, resume, overwrite)
        run = _read_run(work, asked)
    start = time.perf_counter()
    trainer, dtypes = _build_trainer(folder, args, rows, tokenizer, task, pruning)
    if "before" not in run:
        run["before"] = trainer.evaluate()
        if trainer.is_world_process_zero():
            (work / RUN_FILE).write_text(json.dumps(run), encoding="utf-8")
    outcome = trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if resume else None)
    _round(trainer.model, dtypes)
    after = trainer.evaluate()
    report = _report(trainer, run, after, outcome.metrics, time.perf_counter() - start)
    if pruning is not None:
        report["row_pruning"] = pruning.describe(trainer.model)
    _save(trainer, dtypes, report, folder, output, work)
    return report


def checkpoint_task(folder: str | Path) -> Task:
    """What the model in a folder predicts, from its configuration alone."""
    return task_of(empty_model(read_config(folder)))


def _check_teacher(name: str) -> None:
    """Raise what reading it would raise, before the data is read."""
    path = Path(name).expanduser()
    if is_cache_file(path):
        read_description(path)
    else:
        read_config(name)


def _prepare_folder(work: Path, asked: dict[str, Any], resume: bool, overwrite: bool) -> None:
    if work.exists() and not resume:
        if not overwrite:
            raise FileExistsError(
                f"{str(work)!r} holds an interrupted recovery. Continue it with --resume, or start again with "
                "--overwrite."
            )
        shutil.rmtree(work)
    if not (work / RUN_FILE).exists():
        work.mkdir(parents=True, exist_ok=True)
        (work / RUN_FILE).write_text(json.dumps(asked), encoding="utf-8")


def _read_run(work: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What a run noted when it began, which must be what is asked now."""
    run = json.loads((work / RUN_FILE).read_text(encoding="utf-8"))
    for name, value in json.loads(json.dumps(asked)).items():
        if run.get(name) != value:
            raise ValueError(
                f"The interrupted recovery in {str(work)!r} had another {name}: {run.get(name)}, now it is {value}. "
                "Call it with the same arguments, or start again with --overwrite."
            )
    return run


def _build_trainer(
    folder: str | Path,
    args: DistillationArguments,
    rows: RecoveryData,
    tokenizer: Any,
    task: Task,
    pruning: RowPruning | None,
) -> tuple[DistillationTrainer, dict[str, torch.dtype]]:
    """The trainer of the model in float32, and the dtypes of its parameters on disk."""
    model = load_model(folder)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model = model.float()
    if pruning is not None:
        dtypes = pruning.prepare(model, dtypes)
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0
    trainer = DistillationTrainer(
        model,
        args,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        data_collator=RowCollator(pad_id, task),
        processing_class=tokenizer,
        callbacks=[pruning.callback()] if pruning is not None else None,
    )
    return trainer, dtypes


@torch.no_grad()
def _round(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give every parameter the value that it will have on disk."""
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtypes[name]))


def _save(
    trainer: DistillationTrainer,
    dtypes: Mapping[str, torch.dtype],
    report: dict[str, Any],
    folder: str | Path,
    output: Path,
    work: Path,
) -> None:
    """Write everything into a folder within the working folder, then rename it to the output."""
    complete = work / "result"
    for name, parameter in trainer.model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    before, config = read_config(folder), trainer.model.config
    config.dtype = before.dtype
    config.use_cache = getattr(before, "use_cache", True)  # Trainer switches it off
    trainer.save_model(str(complete))
    if not trainer.is_world_process_zero():
        return
    (complete / TRAINING_ARGS_NAME).unlink()  # a pickle; what it says is in the report
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (complete / RECOVERY_FILE).write_text(text + "\n", encoding="utf-8")
    if (Path(folder) / REPORT_FILE).is_file():
        compression = read_report(folder)
        if "row_pruning" in report:
            compression = report_sizes(compression, trainer.model)
        # Scores from before the recovery are not those of this model.
        scores, earlier = compression.pop("evaluation", None), compression.pop("recovery", None)
        compression["recovery"] = {**report, "evaluation_before": scores, "earlier": earlier}
        write_report(compression, complete)
        write_statistics(read_statistics(folder), complete)
        write_pages(complete)
        write_card(complete, repo_name=output.name)
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        output.rename(work / "old")
    complete.rename(output)
    shutil.rmtree(work)


def _report(
    trainer: DistillationTrainer,
    run: Mapping[str, Any],
    after: Mapping[str, float],
    metrics: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    """What was done and measured, ready for JSON; no path of this machine."""
    args, values = trainer.args, dict(run["values"])
    teacher = values.pop("teacher")
    shown = (*DEFAULTS, "temperature", "task_weight", "distillation_weight", "freeze_routers", "only_routers", "seed")
    return {
        "format_version": FORMAT_VERSION,
        "model": public_name(run["model"]),
        "teacher": public_name(teacher),
        "data": run["data"],
        "arguments": {**{name: _plain(getattr(args, name)) for name in shown}, **values},
        "held_out_before": _losses(run["before"]),
        "held_out_after": _losses(after),
        "steps": trainer.state.global_step,
        "train_loss": metrics["train_loss"],
        "seconds_of_last_run": seconds,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")}
        | {"hf_mcsmoe": package_version()},
    }


def public_name(name: str) -> str:
    """A Hub id, or the last part of a path: the folders above tell about the machine."""
    return hub_id(name) or Path(name).name


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value  # transformers' enumerations


def _losses(metrics: Mapping[str, float]) -> dict[str, float]:
    names = ("loss", "loss_task", "kl", "loss_hidden", "loss_router")
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}
