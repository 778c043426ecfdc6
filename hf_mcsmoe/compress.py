"""compress_moe: the whole pipeline, from the user's model to a smaller one."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .allocation import ALLOCATION
from .auto import check_auto, choose_recipe, executor_for, record_choice
from .auto_candidates import AUTO
from .calibration import Calibration, load_calibration
from .checkpoint import check_free_space, check_output_folder, save_checkpoint
from .config import MergedSparseMoeConfig
from .dequantize import dequantizing_config, forget_unpacking, method_name, refuse_quantized
from .executors.in_memory import reached
from .executors.kept_inputs import collect_first, visits
from .families import find_layers, reading_part, tied_layers
from .layer_compression import compress_layer, follow
from .layouts import budget_of_layer, check_layout, native_target, resolve_layers
from .loading import empty_model, load_model, load_tokenizer, read_config
from .modeling.offload import fetched
from .outcome import conclude, count
from .planning import plan
from .recipe import PRESETS, Recipe
from .recipe_reading import recipe_from_preset, recipe_from_yaml
from .saliency import SALIENCY
from .types import CompressionReport, LayerReport, LayerStatistics, MoeLayer

logger = logging.get_logger(__name__)


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
    executor: str = "in_memory",
    device: str | torch.device = "auto",
    hidden_states_bytes: int = 2**30,
) -> PreTrainedModel:
    """Compress the experts of a sparse MoE model, in place where `model` is an object, layer by layer.

    Args:
        model: A model in any device map that Accelerate makes, or a folder or Hub id to load.
        config: A request, a preset ("m-smoe", ...), a `Recipe`, or the path of a YAML recipe. "auto" tries several
            recipes on copies of the model in memory and takes the best, see `auto.choose_recipe`.
        calibration: Whatever `load_calibration` takes: texts, a dataset, a file, token ids, a DataLoader. None
            takes a text that ships with the package, with a warning: good for a first look only.
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
        executor: "in_memory" loads the whole model. "streaming" reads, compresses and writes a path into `output_dir`
            layer by layer and never holds more than two decoder layers and the embeddings; a killed run goes on
            where it was when called again; a model that cannot be streamed is loaded instead, with a warning.
            "auto" streams where path, `output_dir` and no `device_map` are given.
        device: Where streaming computes: "auto" is the GPU where there is one.
        hidden_states_bytes: Most bytes of calibration hidden states that streaming keeps in RAM.

    Returns:
        The compressed model with the attribute `compression_report`. Mapped layout: of a class registered for
        `MergedSparseMoeConfig`. Native layout: of its own class, with fewer experts. After streaming its weights
        are on the meta device: load `output_dir` to run it.

    Raises:
        ValueError: Anything that cannot be done; before the model runs and before a file is written, except
            what only the statistics can show.
        FileExistsError: `output_dir` is not empty.
    """
    from .executors import streaming  # here, because it is built on what this file offers

    start = time.perf_counter()
    recipe = as_recipe(config)
    path = model if isinstance(model, str | Path) else None
    unpacking = None
    streams = streaming.choose_executor(executor_for(recipe, executor), path, output_dir, device_map)
    output = check_output_folder(output_dir, overwrite or (streams and streaming.is_published(output_dir)))
    if path is not None:
        config_of_path = read_config(path, trust_remote_code=trust_remote_code)
        unpacking = dequantizing_config(config_of_path)
        described = empty_model(config_of_path, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer or load_tokenizer(path, trust_remote_code=trust_remote_code)
    else:
        described = model
    check_model(described, recipe)
    if path is None:
        refuse_quantized(model)
    if output is not None:
        done = streaming.written_bytes(output) if streams else 0
        check_free_space(output, plan(described, recipe).total_bytes_after - done)
    data = load_calibration(
        calibration,
        tokenizer,
        num_samples=num_samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=recipe.seed,
        vocab_size=reading_part(described).get_input_embeddings().num_embeddings,
    )
    if streams:
        how = {"tokenizer": tokenizer, "dtype": dtype, "device": device, "progress": progress}
        how |= {"hidden_states_bytes": hidden_states_bytes, "trust_remote_code": trust_remote_code}
        result = streaming.stream_if_possible(path, config_of_path, recipe, data, output, **how)
        if result is not None:
            return result
        device_map = "auto"
    if path is not None:
        how = {"quantization_config": unpacking} if unpacking is not None else {}
        model = load_model(path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, **how)
    report = compress_loaded(model, recipe, data, progress=progress, start=start)
    if unpacking is not None:
        note_unpacking(model, unpacking, report)
    if output is not None:
        save_checkpoint(model, report, output, tokenizer=tokenizer, overwrite=overwrite)
    return model


def note_unpacking(model: PreTrainedModel, unpacking: Any, report: CompressionReport) -> None:
    """Say that a quantized checkpoint was unpacked, and let the model forget how."""
    forget_unpacking(model)
    notice = f"The checkpoint was quantized ({method_name(unpacking)}); the result is in {model.dtype}."
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
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a PreTrainedModel, a folder or a Hub id. "
            "Merge adapters first (merge_and_unload) if it is a PEFT model."
        )
    if recipe.preset == AUTO:
        check_auto(model, recipe)
    else:
        check_layout(find_layers(model), recipe, model=model)


def compress_loaded(
    model: PreTrainedModel, request: Recipe, data: Calibration, *, progress: bool, start: float
) -> CompressionReport:
    """Compress in memory as asked, or for "auto" with the best of its recipes. `model` was checked."""
    if request.preset != AUTO:
        return compress_in_memory(model, request, data, progress=progress, start=start)

    def compress(copied: PreTrainedModel, candidate: Recipe) -> None:
        compress_in_memory(copied, candidate, data, progress=False, start=start)

    recipe, trials = choose_recipe(model, request, data, compress, progress=progress)
    compress_in_memory(model, recipe, data, progress=progress, start=start)
    record_choice(model, recipe, trials)
    return model.compression_report


def compress_in_memory(
    model: PreTrainedModel, recipe: Recipe, data: Calibration, *, progress: bool, start: float
) -> CompressionReport:
    """Statistics in one pass, then each layer in order. `model` was checked; it is changed in place."""
    found = find_layers(model)
    layers, excluded = resolve_layers(found, recipe)
    first_of_tied = tied_layers(found)
    tied = {layer: first for layer in found if (first := first_of_tied.get(layer.name)) in layers}
    before = count(model)
    check_finite(layers)
    collected = collect_first(model, layers, tied, data, recipe, progress)
    statistics = reached(collected)
    layers, warnings = leave_unreached(layers, statistics, recipe)
    allotted = dict(zip(layers, allocate(layers, recipe, statistics), strict=True))
    native = native_target(model, recipe, layers, excluded) if recipe.layout == "native" else None
    reports: dict[str, LayerReport] = {}
    layouts: dict[str, Any] = {}
    todo = visits(model, layers, tied, data, recipe, collected)
    for layer, of_layer in tqdm(todo, "merging", len(layers), unit="layer", disable=not progress, delay=2):
        report, layout = compress_layer(layer, recipe, of_layer, allotted[layer])
        reports[layer.name], layouts[layer.name] = report, layout
        for other in [other for other, first in tied.items() if first is layer]:
            follow(other, layer, report, layout, recipe)
            layouts[other.name] = layout
    if tied:
        model.tie_weights()
    layouts = {layer.name: layouts[layer.name] for layer in found if layer.name in layouts}
    in_order = [reports[layer.name] for layer in layers]
    how = {"native": native, "before": before, "start": start, "warnings": warnings}
    conclude(model, recipe, data, layers, in_order, layouts, **how)
    return model.compression_report


def allocate(layers: list[MoeLayer], recipe: Recipe, statistics: dict[str, LayerStatistics]) -> list[int]:
    """Experts that each layer keeps, by the recipe's allocation rule."""
    saliency_of_layer = [saliency_of(layer, recipe, statistics[layer.name]) for layer in layers]
    how = {"options": recipe.allocation_options}
    how["supply"] = {"statistics_of_layer": lambda: [statistics[layer.name] for layer in layers]}
    return ALLOCATION.call(recipe.allocation, saliency_of_layer, budget_of_layer(layers, recipe), **how)


def saliency_of(layer: MoeLayer, recipe: Recipe, statistics: LayerStatistics) -> Tensor:
    """The recipe's saliency of each expert of a layer, (N,)."""
    with fetched(layer.experts):
        weights = None
        if "weights" in SALIENCY.needs(recipe.saliency):
            weights = layer.family.view(layer, layer.family.stack(layer, layer.expert_parameters))
        return SALIENCY[recipe.saliency](statistics, weights, **recipe.saliency_options)


def leave_unreached(
    layers: list[MoeLayer], statistics: dict[str, LayerStatistics], recipe: Recipe
) -> tuple[list[MoeLayer], list[str]]:
    """The layers that calibration reached, and what to warn of: those for images see no token of a text.

    Raises:
        ValueError: There are others, and the layout is native, where one M holds for all.
    """
    names = [layer.name for layer in layers if layer.name not in statistics]
    if not names:
        return layers, []
    listed = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if recipe.layout == "native":
        raise ValueError(
            f"No calibration token reached {listed}. Give calibration data that uses them (images for vision "
            "experts), leave them out with exclude_layers, or use layout='mapped', which leaves them as they are."
        )
    message = f"No calibration token reached {listed}: left as they are. Give calibration data that uses them."
    logger.warning(message)
    return [layer for layer in layers if layer.name in statistics], [message]


def check_finite(layers: list[MoeLayer]) -> None:
    """Raise ValueError for NaN or Inf in the experts of a layer, naming layer and expert."""
    for layer in layers:
        with fetched(layer.experts):
            for name, parameter in layer.family.stack(layer, layer.expert_parameters).items():
                rows = parameter.detach().flatten(1)
                # Extremes pass NaN on, and take a tenth of the time and no memory beside isfinite of everything.
                finite = torch.isfinite(rows.amax(dim=1)) & torch.isfinite(rows.amin(dim=1))
                if not finite.all():
                    bad = (~finite).nonzero().flatten().tolist()
                    raise ValueError(
                        f"{name} of {layer.name!r} holds NaN or Inf in expert {bad}. "
                        "The checkpoint is damaged or was saved in a dtype too narrow for it; get a sound copy."
                    )
