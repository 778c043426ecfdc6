"""compress_moe: the whole pipeline, from the user's model to a smaller one."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .auto import check_auto, choose_recipe, record_choice
from .auto_candidates import AUTO
from .calibration import Calibration, load_calibration
from .checkpoint import check_free_space, check_output_folder, save_checkpoint
from .config import MergedSparseMoeConfig
from .dequantize import dequantizing_config, forget_unpacking, refuse_quantized, unpacking_notice
from .executors.gradients import check_gradients
from .executors.processes import FailingTogether, Processes, current, device_map_of, in_all_processes
from .families import find_layers, reading_part
from .fitting import resolve_fit
from .layouts import check_layout, resolve_layers
from .loading import empty_model, load_model, load_tokenizer, read_config
from .pipeline import compress_in_memory
from .planning import plan
from .recipe import PRESETS, Recipe
from .recipe_reading import recipe_from_preset, recipe_from_yaml, resolved
from .saved_statistics import SavedStatistics, open_statistics
from .types import CompressionReport

logger = logging.get_logger(__name__)


@in_all_processes
def compress_moe(
    model: PreTrainedModel | str | Path,
    config: MergedSparseMoeConfig | Recipe | str | Path = "m-smoe",
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    output_dir: str | Path | None = None,
    num_samples: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    progress: bool = True,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    executor: str = "auto",
    device: str | torch.device = "auto",
    hidden_states_bytes: int = 2**30,
) -> PreTrainedModel:
    """Compress the experts of a sparse MoE model, in place where `model` is an object, layer by layer.

    Under `torchrun` or `accelerate launch`, or with a group of torch.distributed, call it in all processes: each holds
    the model, runs its part of the calibration batches and compresses its part of the layers; the result is that of
    one process up to the order of float64 sums, in all of them. The first one writes `output_dir`.

    Args:
        model: A model in any device map that Accelerate makes, or a folder or Hub id to load.
        config: A request, a preset ("m-smoe", ...), a `Recipe`, or the path of a YAML recipe. "auto" tries several
            recipes on copies of the model in memory and takes the best, see `auto.choose_recipe`.
        calibration: Whatever `load_calibration` takes: texts, a dataset, a file, token ids, a DataLoader. None
            takes a text that ships with the package, with a warning: good for a first look only. Or the folder that
            `calibrate` wrote for this model: nothing is run then.
        tokenizer: Needed for text; loaded from `model` where that is a path.
        output_dir: Where to write the checkpoint, tokenizer, report and model card; written beside it first and
            renamed when complete.
        num_samples: How many rows of the calibration data to use.
        sequence_length: Tokens per row for text.
        batch_size: Rows per forward.
        overwrite: Replace a folder `output_dir` that is not empty.
        progress: Show progress bars.
        dtype: For loading a path, as in `from_pretrained`.
        device_map: For loading a path, as in `from_pretrained`.
        trust_remote_code: For loading a path, as in `from_pretrained`.
        executor: "auto" streams where a path, an `output_dir` and no `device_map` are given, else it loads the whole
            model, as "in_memory" does. Streaming reads, compresses and writes decoder layer by decoder layer and
            never holds more than two of them, the embeddings and hidden states; a killed run goes on where it was
            when called again. What cannot be streamed is loaded instead, with a warning that says why. "streaming"
            insists on the three conditions.
        device: Where streaming computes: "auto" is the GPU where there is one.
        hidden_states_bytes: Most bytes of calibration hidden states that streaming keeps in RAM.

    Returns:
        The compressed model with the attribute `compression_report`. Mapped layout: of a class registered for
        `MergedSparseMoeConfig`. Native layout: of its own class, with fewer experts. After streaming its weights
        are on the meta device, and it has the attribute `streaming_summary`: load `output_dir` to run it.

    Raises:
        ValueError: Anything that cannot be done; before the model runs and before a file is written, except
            what only the statistics can show.
        FileExistsError: `output_dir` is not empty.
    """
    from .executors import streaming  # here, because it is built on what this file offers
    from .executors.streaming_choice import choose_executor

    start, processes = time.perf_counter(), current()
    progress = progress and processes.is_first
    recipe = as_recipe(config)
    path, unpacking = model if isinstance(model, str | Path) else None, None
    executor = executor_of(processes, executor)
    streams = choose_executor(executor, recipe, path, output_dir, device_map)
    output = check_output_folder(output_dir, overwrite or (streams and streaming.is_published(output_dir)))
    if path is not None:
        config_of_path = read_config(path, trust_remote_code=trust_remote_code)
        unpacking = dequantizing_config(config_of_path)
        described = empty_model(config_of_path, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer or load_tokenizer(path, trust_remote_code=trust_remote_code)
    else:
        described = model
    check_kind(described)
    recipe, fit = resolve_fit(described, recipe, dtype=dtype)
    check_model(described, recipe)
    if path is None:
        refuse_quantized(model)
    if output is not None:
        done = streaming.written_bytes(output) if streams else 0
        check_free_space(output, plan(described, recipe).total_bytes_after - done)
    reading = {"num_samples": num_samples, "sequence_length": sequence_length, "batch_size": batch_size}
    data = open_calibration(calibration, tokenizer, recipe, described, **reading)
    check_same(processes, [recipe], data, described)
    if streams:
        how = {"tokenizer": tokenizer, "dtype": dtype, "device": device, "progress": progress}
        how |= {"hidden_states_bytes": hidden_states_bytes, "trust_remote_code": trust_remote_code, "fit": fit}
        result = streaming.stream_if_possible(path, config_of_path, recipe, data, output, **how)
        if result is not None:
            return result
        device_map = "auto"
    if path is not None:
        how = {"quantization_config": unpacking} if unpacking is not None else {}
        device_map = device_map_of(processes, device_map)
        model = load_model(path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **how)
    if isinstance(data, SavedStatistics):
        data.check_model(model)
    report = compress_loaded(model, recipe, data, progress=progress, start=start)
    if fit is not None:
        report = model.compression_report = dataclasses.replace(report, fit=fit.to_dict())
    if unpacking is not None:
        note_unpacking(model, unpacking, report)
    if output is not None and processes.is_first:
        save_checkpoint(model, report, output, tokenizer=tokenizer, overwrite=overwrite)
    processes.agree()  # the checkpoint is complete
    return model


def executor_of(processes: Processes, executor: str) -> str:
    """The executor of several processes: the one that holds the model in memory.

    Raises:
        ValueError: The other one is asked for.
    """
    if processes.is_alone:
        return executor
    if executor == "streaming":
        raise ValueError(
            f"executor is 'streaming', but {processes.count} processes share the work, which only the executor "
            "'in_memory' can. Run one process, or use executor='in_memory'."
        )
    return "in_memory" if executor == "auto" else executor


def check_same(
    processes: Processes, recipes: list[Recipe], data: Calibration | SavedStatistics, model: PreTrainedModel
) -> None:
    """Refuse, before anything runs, processes whose recipes, calibration data or models differ.

    Raises:
        ValueError: They do.
    """
    if processes.is_alone:
        return
    batches = [tuple(batch.token_mask.shape) for batch in data.batches] if isinstance(data, Calibration) else []
    calibration = [data.fingerprint()["sha256"], batches]
    layers = [(layer.name, layer.num_slots, layer.intermediate_size) for layer in find_layers(model)]
    asked = [resolved(recipe) for recipe in recipes]
    processes.check_same({"recipe": asked, "calibration": calibration, "model": layers})


def open_calibration(
    calibration: Any, tokenizer: Any, recipe: Recipe, model: PreTrainedModel, **reading: Any
) -> Calibration | SavedStatistics:
    """What to calibrate on, or what calibration left: read and checked.

    Raises:
        ValueError: Data that cannot be read, or saved statistics that do not serve the recipe.
    """
    saved = open_statistics(calibration)
    if saved is None:
        vocab_size = reading_part(model).get_input_embeddings().num_embeddings
        return load_calibration(calibration, tokenizer, seed=recipe.seed, vocab_size=vocab_size, **reading)
    saved.check_recipe(recipe)
    return saved


def note_unpacking(model: PreTrainedModel, unpacking: Any, report: CompressionReport) -> None:
    """Say that a quantized checkpoint was unpacked, and let the model forget how."""
    forget_unpacking(model)
    notice = unpacking_notice(unpacking, model.dtype)
    logger.warning(notice)
    report.warnings.append(notice)


def as_recipe(config: MergedSparseMoeConfig | Recipe | str | Path) -> Recipe:
    """The recipe that the user means, checked.

    Raises:
        TypeError: `config` is none of the four kinds.
    """
    if isinstance(config, Recipe):
        return config
    if isinstance(config, MergedSparseMoeConfig):
        return config.to_recipe()
    if isinstance(config, str) and (config in PRESETS or not config.endswith((".yaml", ".yml"))):
        return recipe_from_preset(config)
    if isinstance(config, str | Path):
        return recipe_from_yaml(config)
    raise TypeError(
        f"config is a {type(config).__name__}; it must be a MergedSparseMoeConfig, a Recipe, the name of a preset or "
        "the path of a YAML recipe."
    )


def check_model(model: PreTrainedModel, recipe: Recipe) -> None:
    """Refuse what cannot be compressed, before anything runs.

    Raises:
        TypeError: Not a model of transformers.
        ValueError: Already compressed, or not fit for the recipe.
    """
    check_kind(model)
    if recipe.preset == AUTO:
        check_auto(model, recipe)
    else:
        layers = find_layers(model)
        check_layout(layers, recipe, model=model)
        check_gradients(model, resolve_layers(layers, recipe)[0], recipe.statistics_with("gradients"))


def check_kind(model: Any) -> None:
    """Raise TypeError for anything but a model of transformers."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a PreTrainedModel, a folder or a Hub id. "
            "Merge adapters first (merge_and_unload) if it is a PEFT model."
        )


def compress_loaded(
    model: PreTrainedModel, request: Recipe, data: Calibration | SavedStatistics, *, progress: bool, start: float
) -> CompressionReport:
    """Compress in memory as asked, or for "auto" with the best of its recipes. `model` was checked."""
    if request.preset != AUTO:
        return compress_in_memory(model, request, data, progress=progress, start=start)

    def compress(copied: PreTrainedModel, candidate: Recipe) -> None:
        with FailingTogether(current()):  # what one of several processes cannot do is skipped in all of them
            compress_in_memory(copied, candidate, data, progress=False, start=start)

    recipe, trials = choose_recipe(model, request, data, compress, progress=progress)
    compress_in_memory(model, recipe, data, progress=progress, start=start)
    record_choice(model, recipe, trials)
    return model.compression_report
