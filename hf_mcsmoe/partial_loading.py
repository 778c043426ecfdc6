"""Loading a checkpoint with some of its experts only: the tensors of the others are never read."""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .executors.shards import NotStreamableError, Shards
from .executors.skeleton import targets
from .families import find_layers
from .grouping.dominant_experts import choose_dominant
from .layouts import check_layout, native_target, resolve_layers
from .loading import empty_model, native_class, read_config
from .modeling.experts import rename_counts, slot_axis
from .modeling.native_config import config_parts
from .recipe_reading import recipe_from_preset
from .types import MoeLayer


def load_experts(
    path: str | os.PathLike,
    pattern: Mapping[str, Tensor],
    *,
    keep: float | None = None,
    num_experts: int | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
) -> PreTrainedModel:
    """A plain model of the original class with the experts of the largest scores of each layer.

    The same as `compress_moe` with the preset "premoe" on the task of the pattern, without loading the whole model.
    Memory: at most twice that of the result; experts that stay out are not read, where the checkpoint stores experts
    one by one or stacked.

    Args:
        path: Folder or Hub id with safetensors.
        pattern: Scores (N,) of each layer, from `task_pattern` or `load_task_patterns`.
        keep: Share of the experts that is loaded; 0.5 if neither is given.
        num_experts: The same as a number per layer.
        dtype: As in `from_pretrained`.
        device_map: As in `from_pretrained`.

    Returns:
        The model in evaluation mode, with the attribute `loaded_experts`: the experts of each layer, by its name.

    Raises:
        ValueError: The pattern is of another model, the native layout is not possible, the checkpoint is quantized,
            or its experts cannot be read apart.
        FileNotFoundError: No such model.
    """
    config = read_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{str(path)!r} is quantized, so its experts cannot be read apart. Use compress_moe.")
    recipe = recipe_from_preset("premoe", keep=keep, num_experts=num_experts)
    described = empty_model(config)
    layers = find_layers(described)
    check_layout(layers, recipe, model=described)
    kept, excluded = resolve_layers(layers, recipe)
    check_pattern(kept, pattern)
    number = recipe.experts_per_layer(kept[0].num_slots)
    rows = {x.name: choose_dominant(pattern[x.name], number, x.num_router_groups) for x in kept}
    fields = native_target(described, recipe, kept, excluded)
    try:
        shards = Shards(path)
    except NotStreamableError as error:
        raise ValueError(f"The experts of {str(path)!r} cannot be read apart: {error}. Use compress_moe.") from error
    tensors = dict(read_kept(shards, targets(described, shards), kept, rows))
    model, info = native_class(config).from_pretrained(
        None,
        config=cut_config(config, fields.counting_parts, kept[0].num_slots, number),
        state_dict=tensors,
        dtype=dtype,
        device_map=device_map,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = [*sorted(info["missing_keys"]), *(name for name, *_ in sorted(info["mismatched_keys"]))]
        raise ValueError(f"{str(path)!r} could not be read: {', '.join(wrong[:5])}. Download the model again.")
    model.config.name_or_path = str(path)
    model.loaded_experts = {name: of_layer.tolist() for name, of_layer in rows.items()}
    return model.eval()


def check_pattern(layers: list[MoeLayer], pattern: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a pattern that does not have a score for each expert of each layer."""
    sizes = {name: score.numel() for name, score in pattern.items()}
    odd = [layer.name for layer in layers if sizes.get(layer.name) != layer.num_slots]
    if odd:
        raise ValueError(
            f"The pattern has {sizes.get(odd[0], 'no')} scores for {odd[0]!r}, which does not have as many experts. "
            "Make it with this model: task_pattern(model, texts, tokenizer)."
        )


def cut_config(config: PreTrainedConfig, paths: set[str], num_slots: int, num_experts: int) -> PreTrainedConfig:
    """A copy of the configuration that says M where it says N."""
    config = copy.deepcopy(config)
    for path, part in config_parts(config):
        if path in paths:
            rename_counts(part, num_slots, num_experts)
    return config


def read_kept(
    shards: Shards, target_of: Mapping[str, str], layers: list[MoeLayer], rows: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the cut model, by the names that a checkpoint of it has.

    Raises:
        ValueError: A tensor holds experts in a way that they cannot be told apart.
    """
    layer_of_experts = {f"{layer.name}.{name}": layer for layer in layers for name in layer.expert_parameters}
    layer_of_router = {name: layer for layer in layers for name in router_tensors(layer)}
    for name, target in target_of.items():
        if target in layer_of_experts:
            layer = layer_of_experts[target]
            yield from read_experts(shards, target_of, name, layer, rows[layer.name])
            continue
        with shards.opened([name]) as slices:
            tensor = slices[name][...]
        layer = layer_of_router.get(target)
        yield name, tensor if layer is None else cut_rows(tensor, layer, rows[layer.name])


def router_tensors(layer: MoeLayer) -> list[str]:
    """Names in the model of the tensors that may have a row for each slot."""
    of_router = [f"{layer.router_name}.{name}" for name in layer.router.state_dict()]
    return [*of_router, *(f"{layer.block_name}.{name}" for name in layer.block.state_dict() if "." not in name)]


def cut_rows(tensor: Tensor, layer: MoeLayer, rows: Tensor) -> Tensor:
    """The rows of the slots that stay, of a tensor that has one for each; any other as it is."""
    passive = torch.arange(layer.num_slots, layer.num_slots + layer.num_passive_rows)
    for size, kept in ((layer.num_slots, rows), (layer.num_slots + len(passive), torch.cat([rows, passive]))):
        axis = slot_axis(tensor, size)
        if axis is not None:
            return tensor.index_select(axis, kept)
    return tensor


def read_experts(
    shards: Shards, target_of: Mapping[str, str], name: str, layer: MoeLayer, rows: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """What a tensor of the checkpoint holds of the experts that stay: nothing, itself renamed, or some of its rows."""
    place = expert_number(target_of, name, layer)
    if place is not None:
        expert, kept = int(name[place]), rows.tolist()
        if expert in kept:
            with shards.opened([name]) as slices:
                yield f"{name[: place.start]}{kept.index(expert)}{name[place.stop :]}", slices[name][...]
        return
    num_stacked = shards.tensors[name].shape[0] if shards.tensors[name].shape else 0
    if num_stacked not in (layer.num_experts, layer.num_experts + layer.num_identity_slots):
        raise ValueError(
            f"{name!r} holds experts of {layer.name!r} in a way that they cannot be read apart. Use compress_moe."
        )
    kept = [*rows.tolist(), *range(layer.num_experts, num_stacked)]
    with shards.opened([name]) as slices:
        yield name, torch.cat([slices[name][row : row + 1] for row in kept])


def expert_number(target_of: Mapping[str, str], name: str, layer: MoeLayer) -> slice | None:
    """Where the name of a tensor of one expert says which expert it is of; None for a tensor of all of them."""
    of_layer = {f"{layer.name}.{parameter}" for parameter in layer.expert_parameters}
    for match in re.finditer(r"\d+", name):
        others = [f"{name[: match.start()]}{expert}{name[match.end() :]}" for expert in range(layer.num_experts)]
        if all(target_of.get(other) in of_layer for other in others):
            return slice(match.start(), match.end())
    return None
