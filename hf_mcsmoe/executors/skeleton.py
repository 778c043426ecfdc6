"""A model without weights, and parts of it with: read from shards by transformers' own conversion."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from ..dequantize import forget_unpacking
from ..loading import native_class
from .shards import OTHER_DTYPES, Shards


def open_skeleton(
    path: str | os.PathLike, config: PreTrainedConfig, shards: Shards, dtype: str | torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model as `from_pretrained` makes it, all weights on the meta device, computed buffers on `device`.

    Args:
        path: Folder or Hub id, for the generation configuration.
        config: Of the model.
        shards: Its weights.
        dtype: Of the weights, "auto" for that of the checkpoint.
        device: Where the model will compute.

    Raises:
        ValueError: Weights are missing, have another shape than the configuration says, or a dtype that needs
            scales to be read.
    """
    model_class = native_class(config)
    how = {}
    if shards.unpacking is not None:
        # Loading takes the quantization out of the configuration that it is given.
        config, how = copy.deepcopy(config), {"quantization_config": shards.unpacking.quantization_config}
    with quiet():
        try:
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=shards.on_meta(),
                dtype=dtype,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **how,
            )
        except RuntimeError as error:
            raise ValueError(
                f"The weights of {str(path)!r} do not fit its configuration: {error}. Download the model again."
            ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"])
        raise ValueError(
            f"{str(path)!r} lacks {len(wrong)} weights that its configuration asks for, or has them in another "
            f"shape: {', '.join(wrong[:5])}. A shard is damaged or of another model; download it again."
        )
    if shards.unpacking is not None:
        forget_unpacking(model)
    model.config.name_or_path = str(path)
    if model.can_generate():
        names = ("cache_dir", "proxies", "token", "revision", "trust_remote_code")
        arguments = {**dict.fromkeys(names), "local_files_only": is_offline_mode(), "subfolder": ""}
        model.adjust_generation_fn(None, False, None, path, force_download=False, **arguments)
    compute_buffers(model, device)
    return model


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give buffers that no checkpoint holds, such as rotary frequencies, the values that `from_pretrained` gives."""
    names = [name for name, _ in model.named_non_persistent_buffers()]
    model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
    for name in names:
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()  # touches no weight: those are on the meta device


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would appear for every layer."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def targets(model: PreTrainedModel, shards: Shards) -> dict[str, str]:
    """The parameter or buffer that each tensor of a checkpoint goes into (one of them, where it is split).

    Raises:
        ValueError: A tensor of whole numbers or of 8-bit floats would go into a parameter.
    """
    mapping = get_model_conversion_mapping(model, hf_quantizer=shards.unpacking)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    target_of = {}
    for name, stored in shards.tensors.items():
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, _ = rename_source_key(name, [], [], model.base_model_prefix, known)
        if target not in known:
            continue  # parts that transformers leaves out, such as multi-token prediction
        if shards.unpacking is None and stored.dtype in OTHER_DTYPES and known[target].is_floating_point():
            raise ValueError(
                f"{name!r} is stored as {stored.dtype}, but {target!r} is a weight of {known[target].dtype}: its "
                "values mean nothing without their scales. Convert the model to bfloat16."
            )
        target_of[name] = target
    return target_of


def load_tensors(model: PreTrainedModel, shards: Shards, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Fill the parameters that tensors of the checkpoint belong to; all sources of a fused one are needed.

    Args:
        model: See `open_skeleton`.
        shards: Where the tensors come from; says how they are unpacked.
        tensors: By the name that they have in the checkpoint, on any device.
        device: Of the parameters.

    Raises:
        ValueError: A tensor cannot be converted.
    """
    # What saving reverts; the call below would forget all but its own.
    conversions = model.__dict__.get("_weight_conversions")
    load_config = LoadStateDictConfig(
        device_map={"": device},
        dtype=model.config.dtype,
        dtype_plan=model._get_dtype_plan(model.config.dtype),
        hf_quantizer=shards.unpacking,
        weight_mapping=get_model_conversion_mapping(model, hf_quantizer=shards.unpacking),
    )
    with quiet():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, load_config)
    forget_unpacking(model)
    if conversions is not None:
        model._weight_conversions = conversions
    if info.mismatched_keys or info.conversion_errors:
        wrong = [*info.conversion_errors, *(name for name, *_ in info.mismatched_keys)]
        raise ValueError(f"{', '.join(wrong[:5])} could not be read from the shards. Download the model again.")


def stored_tensors(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and saved buffers of a module, by full name."""
    return module.state_dict(prefix=prefix)


def release(module: nn.Module) -> None:
    """Put parameters and saved buffers back on the meta device; computed buffers stay."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not parameter.is_meta:
                child._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = buffer.to("meta")


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names under which a model holds a parameter that it stores under another name."""
    tied: dict[str, Any] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name
        for name, source in tied.items()
        if model.get_parameter_or_buffer(name) is model.get_parameter_or_buffer(source)
    }
