"""Compressing a checkpoint that need not fit in memory: decoder layer by decoder layer, from shards to shards."""

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..calibration import Calibration
from ..dequantize import dequantizing_config, unpacking_notice, unpacking_of_layers
from ..families import find_layers
from ..fitting import Fit
from ..layouts import native_target, resolve_layers
from ..loading import empty_model, read_config
from ..outcome import conclude, count
from ..pipeline import leave_unreached
from ..publishing.report import read_report
from ..publishing.statistics_file import read_statistics
from ..recipe import Recipe
from ..saved_statistics import OtherModelError, SavedStatistics
from ..sizes import measure
from ..types import CompressionReport, MoeLayer
from .decoder_stack import DecoderStack
from .journal import JOURNAL_FILE, Journal
from .output_shards import is_disk_full, publish
from .shards import NotStreamableError, Shards
from .skeleton import open_skeleton, targets
from .streaming_budgets import decide_budgets
from .streaming_choice import check_streamable, choose_device, say_loaded
from .streaming_fingerprint import fingerprint
from .streaming_model import StreamedModel
from .streaming_passes import Passes, has_room_for_tokens, plan_passes
from .streaming_run import StreamingRun
from .streaming_summary import StreamingSummary
from .unit_check import UnfollowedStreamError

HIDDEN_STATES_BYTES = 2**30


def compress_by_streaming(
    path: str | os.PathLike,
    config: PreTrainedConfig,
    recipe: Recipe,
    data: Calibration | SavedStatistics,
    output: Path,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    hidden_states_bytes: int = HIDDEN_STATES_BYTES,
    progress: bool = True,
    trust_remote_code: bool = False,
    fit: Fit | None = None,
) -> PreTrainedModel:
    """Compress a checkpoint into the folder `output`, with the same result as `compress_in_memory`.

    Work is done in the folder `<output>.partial`. The same call goes on there after a crash, from the last decoder
    layer that was finished. `output` appears when it is complete.

    Memory: two decoder layers, the embeddings, and `hidden_states_bytes` or one batch of hidden states.
    Passes over the weights: one or two, see `plan_passes`.

    Args:
        path: Folder or Hub id with safetensors.
        config: Its configuration.
        recipe: Checked.
        data: Calibration batches, or what calibration left.
        output: Folder that does not exist, or may be replaced.
        tokenizer: Written beside the model.
        dtype: Of weights, computation and result; "auto" for that of the checkpoint.
        device: Where layers are computed; "auto" is the GPU where there is one.
        hidden_states_bytes: Most bytes of calibration hidden states to keep in RAM.
        progress: Show progress bars.
        trust_remote_code: Whether the model's own Python file would be run; such models are not streamed.
        fit: For the report: how the recipe's `keep` was found.

    Returns:
        The compressed model with its weights on the meta device (load `output` to run it), and the attributes
        `compression_report` and `streaming_summary`.

    Raises:
        NotStreamableError: The model's layers cannot run one at a time. Nothing is left behind.
        ValueError: The checkpoint is damaged, saved statistics are of another model, targets cannot be followed, or an
            unfinished run of something else is in the way.
        OSError: The disk is full; finished layers stay, and the same call goes on.
    """
    check_streamable(config, recipe, trust_remote_code)
    packed = dequantizing_config(config)
    shards = Shards(path, unpacking_of_layers(packed) if packed is not None else None)
    device = choose_device(device)
    model = open_skeleton(path, config, shards, dtype, device)
    if isinstance(data, SavedStatistics):
        data.check_configuration(model)
    layers, _ = resolve_layers(find_layers(model), recipe)
    summary = StreamingSummary(0, 0, str(device), len(DecoderStack(model, layers)))  # refuses before a file is written
    target_of = targets(model, shards)
    working = working_folder(output)
    journal = Journal(working, fingerprint(model, shards, recipe, data, device))
    if journal.done("published") and not (working / "model").exists():
        shutil.rmtree(working)
        return described_result(output)
    try:
        with finished_layers_stay(working):
            passes = passes_of(journal, recipe, layers, data, result_bytes=count(model)[1])
            summary.passes, summary.forwards = passes.number, passes.forwards(recipe)
            how = {"device": device, "hidden_states_bytes": hidden_states_bytes, "summary": summary}
            streamed = StreamedModel(model, shards, target_of, layers, data, working, **how)
            run = StreamingRun(streamed, recipe, passes, journal, progress=progress)
            notices = [] if packed is None else [unpacking_notice(packed, model.dtype)]
            finish(run, data, output, tokenizer, notices, fit)
    except (NotStreamableError, OtherModelError, UnfollowedStreamError):
        shutil.rmtree(working)
        raise
    shutil.rmtree(working)
    result = described_result(output)
    result.streaming_summary = summary
    return result


def passes_of(
    journal: Journal,
    recipe: Recipe,
    layers: list[MoeLayer],
    data: Calibration | SavedStatistics,
    *,
    result_bytes: int,
) -> Passes:
    """The passes of a run: those that it began with, however much space the disk has now."""
    if not journal.done("room"):
        has_room = has_room_for_tokens(journal.folder, recipe, layers, data, result_bytes)
        journal.append({"step": "room", "layer": 0, "keeps_tokens": has_room})
    return plan_passes(recipe, layers, data, keeps_tokens=journal.done("room")[0]["keeps_tokens"])


def finish(
    run: StreamingRun,
    data: Calibration | SavedStatistics,
    output: Path,
    tokenizer: Any,
    notices: list[str],
    fit: Fit | None,
) -> None:
    """All visits of all layers, then everything beside the weights, then the folder goes to its place."""
    model, recipe, working = run.streamed.model, run.recipe, run.journal.folder
    before, active = count(model), measure(model, find_layers(model)).active_parameters
    excluded = resolve_layers(find_layers(model), recipe)[1]
    native = native_target(model, recipe, run.layers, excluded) if recipe.layout == "native" else None
    run.streamed.read_before_stack()
    *first, last = run.passes.descriptions
    for description in first:
        run.collect(description)
    run.compress(last, decide_budgets(run))
    run.write_rest()
    reports, layouts, recorded = run.results()
    layers, warnings = leave_unreached(run.layers, [report.layer for report in reports], recipe)
    totals = {"before": before, "after": run.count_after(before), "start": run.start, "warnings": warnings + notices}
    totals |= {"active_before": active, "statistics": recorded, "fit": fit}
    conclude(model, recipe, data, layers, reports, layouts, native=native, **totals)
    run.output.finish(model, run.written(), totals["after"][0])
    run.journal.append({"step": "published", "layer": 0})
    shutil.rmtree(working / "replaced", ignore_errors=True)
    publish(working / "model", output, model.compression_report, tokenizer)


def stream_if_possible(path: str | os.PathLike, *args: Any, **kwargs: Any) -> PreTrainedModel | None:
    """`compress_by_streaming`, or None and a warning for a model that cannot be streamed."""
    try:
        return compress_by_streaming(path, *args, **kwargs)
    except NotStreamableError as reason:
        say_loaded(path, reason)
        return None


def working_folder(output: Path) -> Path:
    """Where an unfinished run keeps its files: beside the output, so that renaming is all it takes to finish."""
    output = output.absolute()
    return output.with_name(f"{output.name}.partial")


def is_published(output_dir: str | os.PathLike) -> bool:
    """Whether `output_dir` is the result of a run that was killed between finishing and cleaning up."""
    working = working_folder(Path(output_dir))
    return (working / JOURNAL_FILE).exists() and not (working / "model").exists() and Path(output_dir).exists()


def written_bytes(output_dir: str | os.PathLike) -> int:
    """Bytes of the shards that an unfinished run has written."""
    return sum(file.stat().st_size for file in (working_folder(Path(output_dir)) / "model").glob("*.safetensors"))


def described_result(output: Path) -> PreTrainedModel:
    """The model in `output` without its weights, with its report."""
    report = CompressionReport.from_dict(read_report(output))
    model = empty_model(read_config(output))
    model.compression_report = dataclasses.replace(report, statistics=read_statistics(output))
    return model


@contextmanager
def finished_layers_stay(working: Path) -> Iterator[None]:
    """Say what to do when the disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk of {str(working)!r} is full. The finished layers are kept there: free some space and run the "
            "same command again to go on",
        ) from error
