"""The native layout with narrower experts: which field of a configuration says how wide they are, and changing it."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..families import find_layers
from ..types import MoeLayer
from .native_config import adopt_counts, config_parts, counting_parts

WIDTH_NAMES = (
    "moe_intermediate_size",
    "expert_intermediate_size",
    "moe_ffn_hidden_size",
    "moe_hidden_size",
    "expert_hidden_size",
    "expert_ffn_dim",
    "moe_dim",
    "ffn_hidden_size",
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
)
# What modules call the width of the experts they hold.
MODULE_NAMES = ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_size", "ffn_dim")


@dataclass(frozen=True)
class NativeFields:
    """What a configuration says about the experts of the layers to compress."""

    counting_parts: set[str]  # paths of the configurations whose expert counts become M
    width_fields: list[tuple[str, str]]  # (path, field) that says the width; empty where it stays


def native_fields(
    model: PreTrainedModel, kept: Sequence[MoeLayer], excluded: Sequence[MoeLayer], num_experts: int, width: int
) -> NativeFields:
    """The fields to change for M experts of a width, see `counting_parts` and `width_fields`.

    Raises:
        ValueError: The configuration cannot say it.
    """
    if width != kept[0].intermediate_size and excluded:
        raise ValueError(
            f"exclude_layers leaves {excluded[0].name!r} as it is, but layout 'native' narrows the experts of all "
            "layers. Use layout='mapped', or a recipe without selection."
        )
    return NativeFields(counting_parts(model, kept, excluded, num_experts), width_fields(model, kept, width))


def adopt_native(
    model: PreTrainedModel, layers: Sequence[MoeLayer], fields: NativeFields, num_experts: int, width: int
) -> None:
    """Write the new number and width of experts wherever the model and its configurations say the old ones."""
    adopt_counts(model, layers, fields.counting_parts, num_experts)
    if fields.width_fields:
        adopt_width(model, layers, fields.width_fields, width)


def width_fields(model: PreTrainedModel, kept: Sequence[MoeLayer], width: int) -> list[tuple[str, str]]:
    """(path of a configuration, field) that says the width of the experts to compress and nothing else.

    Fields are tried by building empty models: with the right one, the experts of the layers to compress get the new
    width and every other tensor keeps its shape.

    Args:
        model: The original model, on any device.
        kept: The layers that are compressed.
        width: The new width.

    Raises:
        ValueError: There is no such field.
    """
    old = kept[0].intermediate_size
    if width == old:
        return []
    odd = [layer.name for layer in kept if layer.intermediate_size != old]
    if odd:
        raise ValueError(
            f"layout 'native' needs experts of one width, but those of {odd[0]!r} are not {old} wide. "
            "Use layout='mapped'."
        )
    before = shapes(model)
    inside = tuple(f"{layer.name}." for layer in kept)
    for path, name in candidates(model.config, old):
        built = model_with(model, path, name, width)
        if built is None:
            continue
        widths = {layer.name: layer.intermediate_size for layer in find_layers(built)}
        after = shapes(built)
        same = all(after.get(key) == shape for key, shape in before.items() if not key.startswith(inside))
        if same and all(widths.get(layer.name) == width for layer in kept):
            return [(path, name)]
    raise ValueError(
        f"No field of {type(model.config).__name__} says the width {old} of the experts of {kept[0].name!r} and "
        "nothing else. Use layout='mapped', or a recipe without selection."
    )


def candidates(config: PreTrainedConfig, width: int) -> Iterator[tuple[str, str]]:
    """(path, field) of everything in a configuration that may be the width of experts."""
    parts = list(config_parts(config))
    for name in WIDTH_NAMES:
        for path, part in parts:
            if part.__dict__.get(name) == width:
                yield path, name


def model_with(model: PreTrainedModel, path: str, name: str, width: int) -> PreTrainedModel | None:
    """An empty model with one field of its configuration changed; None where there can be none."""
    config = copy.deepcopy(model.config)
    setattr(dict(config_parts(config))[path], name, width)
    try:
        with torch.device("meta"):
            return type(model)._from_config(config)
    except (ValueError, RuntimeError, StrictDataclassError):
        return None


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def adopt_width(model: PreTrainedModel, layers: Sequence[MoeLayer], fields: list[tuple[str, str]], width: int) -> None:
    """Write the new width into the configuration, its copies in modules, and the experts modules.

    Args:
        model: With narrowed layers.
        layers: The compressed layers, as they were found.
        fields: From `width_fields`.
        width: The new width.
    """
    old = layers[0].intermediate_size
    for path, name in fields:
        part = dict(config_parts(model.config))[path]
        copies = [getattr(module, "config", None) for module in model.modules()]
        same_kind = [other for other in copies if type(other) is type(part)]
        for owner in {id(owner): owner for owner in [part, *same_kind]}.values():
            setattr(owner, name, width)
    for layer in layers:
        for module in layer.experts.modules():
            for name in MODULE_NAMES:
                if getattr(module, name, None) == old and isinstance(getattr(module, name), int):
                    setattr(module, name, width)
