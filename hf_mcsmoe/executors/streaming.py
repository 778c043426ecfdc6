"""Compressing a checkpoint that need not fit in memory: decoder layer by decoder layer, from shards to shards."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..allocation import ALLOCATION
from ..calibration import Calibration
from ..dequantize import dequantizing_config, method_name, unpacking_notice, unpacking_of_layers
from ..families import find_layers
from ..fitting import Fit
from ..layer.protection import check_room, protected_experts, with_protected
from ..layouts import budget_of_layer, native_target, resolve_layers
from ..loading import empty_model, read_config
from ..outcome import conclude, count, package_version
from ..protection import PROTECTION
from ..publishing.report import read_report
from ..publishing.statistics_file import read_statistics
from ..recipe import Recipe
from ..sizes import measure
from ..types import CompressionReport, LayerStatistics
from .decoder_stack import DecoderStack
from .journal import JOURNAL_FILE, Journal
from .output_shards import is_disk_full, publish
from .shards import NotStreamableError, Shards
from .skeleton import open_skeleton, targets
from .streaming_run import StreamingRun, StreamingSummary

logger = logging.get_logger(__name__)

ONE_PASS_ALLOCATIONS = ("uniform",)  # these do not look at the statistics of other layers
HIDDEN_STATES_BYTES = 2**30


def compress_by_streaming(
    path: str | os.PathLike,
    config: PreTrainedConfig,
    recipe: Recipe,
    data: Calibration,
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
    Passes over the weights: one with `allocation="uniform"`, else two, the second without forwards.

    Args:
        path: Folder or Hub id with safetensors.
        config: Its configuration.
        recipe: Checked.
        data: Calibration batches.
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
        ValueError: The checkpoint is damaged, or an unfinished run of something else is in the way.
        OSError: The disk is full; finished layers stay, and the same call goes on.
    """
    check_streamable(config, trust_remote_code)
    if recipe.sequential:
        raise NotStreamableError("its recipe is sequential")
    if recipe.statistics_with("gradients"):
        raise NotStreamableError("its recipe needs gradients of the loss, through all layers at once")
    packed = dequantizing_config(config)
    shards = Shards(path, unpacking_of_layers(packed) if packed is not None else None)
    device = choose_device(device)
    model = open_skeleton(path, config, shards, dtype, device)
    layers, excluded = resolve_layers(find_layers(model), recipe)
    DecoderStack(model, layers)  # refuses before a file is written
    target_of = targets(model, shards)
    before, active = count(model), measure(model, find_layers(model)).active_parameters
    working = working_folder(output)
    journal = Journal(working, fingerprint(model, shards, recipe, data, device))
    if journal.done("published") and not (working / "model").exists():
        shutil.rmtree(working)
        return described_result(output)
    native = native_target(model, recipe, layers, excluded) if recipe.layout == "native" else None
    all_stay = budget_of_layer(layers, recipe) == [layer.num_slots for layer in layers]
    one_pass = all_stay or (recipe.allocation in ONE_PASS_ALLOCATIONS and recipe.protect is None)
    summary = StreamingSummary(1 if one_pass else 2, str(device), 0)
    try:
        with finished_layers_stay(working):
            how = {"hidden_states_bytes": hidden_states_bytes, "progress": progress, "summary": summary}
            run = StreamingRun(model, shards, target_of, layers, recipe, data, journal, device=device, **how)
            summary.num_decoder_layers = len(run.stack)
            stream(run, one_pass)
            reports, layouts, recorded = run.results()
            notices = [] if packed is None else [unpacking_notice(packed, model.dtype)]
            totals = {"before": before, "after": run.count_after(before), "start": run.start, "warnings": notices}
            totals |= {"active_before": active, "statistics": recorded, "fit": fit}
            conclude(model, recipe, data, layers, reports, layouts, native=native, **totals)
            run.output.finish(model, run.written(), totals["after"][0])
            journal.append({"step": "published", "layer": 0})
            shutil.rmtree(working / "replaced", ignore_errors=True)
            publish(working / "model", output, model.compression_report, tokenizer)
    except NotStreamableError:
        shutil.rmtree(working)
        raise
    shutil.rmtree(working)
    result = described_result(output)
    result.streaming_summary = summary
    return result


def check_streamable(config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Raise NotStreamableError for what the configuration alone rules out."""
    packed = dequantizing_config(config)
    if packed is not None and unpacking_of_layers(packed) is None:
        raise NotStreamableError(f"its weights are quantized ({method_name(packed)})")
    if trust_remote_code and getattr(config, "auto_map", None):
        raise NotStreamableError("it brings its own code")


def stream_if_possible(path: str | os.PathLike, *args: Any, **kwargs: Any) -> PreTrainedModel | None:
    """`compress_by_streaming`, or None and a warning for a model that cannot be streamed."""
    try:
        return compress_by_streaming(path, *args, **kwargs)
    except NotStreamableError as reason:
        logger.warning(
            f"{str(path)!r} cannot be streamed: {reason}. It is loaded with device_map='auto' instead: layers that do "
            "not fit in memory stay on the disk."
        )
        return None


def stream(run: StreamingRun, one_pass: bool) -> None:
    """All visits of all layers."""
    layers = [layer for found in run.layers_of.values() for layer in found]
    budget = budget_of_layer(layers, run.recipe)
    statistics_of_layer: list[LayerStatistics] = []
    run.read_before_stack()
    if one_pass:
        equal = [torch.full((layer.num_slots,), 1 / layer.num_slots) for layer in layers]
        saliency_of_layer, protected, description = equal, {}, "pass 1 of 1: statistics, merging"
    else:
        run.collect("pass 1 of 2: statistics")
        saliency_of_layer, statistics_of_layer, protected = judge(run)
        description = "pass 2 of 2: merging"
    supply = {"statistics_of_layer": lambda: statistics_of_layer, "seed": lambda: run.recipe.seed}
    how = {"options": run.recipe.allocation_options, "supply": supply}
    allotted = ALLOCATION.call(run.recipe.allocation, saliency_of_layer, budget, **how)
    num_experts = dict(zip([layer.name for layer in layers], allotted, strict=True))
    check_room(run.recipe, num_experts, protected)
    run.compress(description, num_experts, protected, with_forward=one_pass or run.recipe.needs_inputs)
    run.write_rest()


def judge(run: StreamingRun) -> tuple[list[Tensor], list[LayerStatistics], dict[str, Tensor]]:
    """(saliency and statistics of each layer, protected experts by layer), from the statistics of all layers.

    Memory: what budgets and protection read of them; the rest is read one layer at a time.
    """
    saliency_of_layer: dict[str, Tensor] = {}
    statistics: dict[str, LayerStatistics] = {}
    names = set(ALLOCATION.needs(run.recipe.allocation))
    if run.recipe.protect is not None:
        names |= PROTECTION.needs(run.recipe.protect)
    for index, found in run.layers_of.items():
        if not found:
            continue
        collected, saliency = run.load_statistics(index)
        saliency_of_layer |= saliency
        for layer, one in collected.items():
            sums = {name: one.statistics.sums[name] for name in names if name in one.statistics.sums}
            statistics[layer] = LayerStatistics(one.statistics.num_tokens, one.statistics.selection_count, sums)
    protected = protected_experts(run.recipe, statistics)
    saliency = [with_protected(one, protected.get(layer)) for layer, one in saliency_of_layer.items()]
    return saliency, list(statistics.values()), protected


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


def choose_executor(executor: str, path: str | Path | None, output_dir: str | Path | None, device_map: Any) -> bool:
    """Whether to stream.

    Raises:
        ValueError: An unknown executor, or streaming without a path, without an output or with a device map.
    """
    if executor not in ("auto", "in_memory", "streaming"):
        raise ValueError(f"executor {executor!r} is unknown; choose one of ['auto', 'in_memory', 'streaming'].")
    possible = path is not None and output_dir is not None and device_map is None
    if executor == "streaming" and not possible:
        raise ValueError(
            "executor 'streaming' needs the path or Hub id of a model, an output_dir, and no device_map. "
            "Give those, or use executor='in_memory'."
        )
    return possible and executor != "in_memory"


def choose_device(device: str | torch.device) -> torch.device:
    """The device, "auto" being the GPU where there is one."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fingerprint(
    model: PreTrainedModel, shards: Shards, recipe: Recipe, data: Calibration, device: torch.device
) -> dict[str, Any]:
    """Everything that decides the bytes of the result, as JSON."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    digest = hashlib.sha256()
    for batch in data.batches:  # unlike the data's own fingerprint, with padding and order
        digest.update(repr(tuple(batch.token_mask.shape)).encode())
        digest.update(batch.inputs["input_ids"].cpu().contiguous().numpy().tobytes())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "hf_mcsmoe": package_version()}
    return {
        "versions": versions,
        "device": device.type,
        "dtype": str(model.config.dtype),
        "model": {"config": config, "shards": shards.fingerprint()},
        "recipe": recipe.to_dict(),
        "calibration": {**data.fingerprint(), "batches": digest.hexdigest()},
    }


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
