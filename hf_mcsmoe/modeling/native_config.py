"""The native layout: which fields of a configuration say how many experts the layers have, and changing them."""

import copy
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..families import find_layers, tied_layers
from ..families.names import NUM_EXPERTS_NAMES, read_attribute
from ..types import MoeLayer
from .experts import rename_counts


def config_parts(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A configuration and those inside it, with their paths: "", "text_config", "thinker_config.text_config", ..."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from config_parts(value, f"{path}.{name}" if path else name)


def check_native(layers: Sequence[MoeLayer], budgets: Sequence[int], *, drops_experts: bool) -> None:
    """Refuse what the native layout cannot be: it needs one M, a router that can be cut, and k choices in its groups.

    Args:
        layers: The layers to compress.
        budgets: M of each.
        drops_experts: Some experts are dropped, not merged into others.

    Raises:
        ValueError: With the number to use, or layout='mapped'.
    """
    first = layers[0]
    odd = [f"{layer.name!r} ({layer.num_slots})" for layer in layers if layer.num_slots != first.num_slots]
    if odd:
        raise ValueError(
            f"layout 'native' needs the same number of experts in all layers, but {first.name!r} has "
            f"{first.num_slots} and {', '.join(odd[:5])} differ. "
            "Use layout='mapped', or leave the others out with exclude_layers."
        )
    for layer, budget in zip(layers, budgets, strict=True):
        groups, slots = layer.num_router_groups, layer.num_slots
        least = groups * layer.experts_per_group
        if budget < least or budget % groups:
            allowed = range(-(-least // groups) * groups, slots + 1, groups)
            below = [value for value in allowed if value < budget][-1:]
            above = [value for value in allowed if value > budget][:1]
            in_groups = f" in {groups} groups of which each keeps the same number" if groups > 1 else ""
            raise ValueError(
                f"num_experts is {budget}, but in layout 'native' the router of {layer.name!r} picks {layer.top_k} of "
                f"{slots} experts{in_groups}: at least {least}{f', a multiple of {groups}' if groups > 1 else ''}. "
                f"Use {' or '.join(map(str, below + above))}, or layout='mapped'."
            )
        rows = slots + layer.num_passive_rows
        if not any(p.dim() == 2 and p.shape[0] == rows for p in layer.router.parameters()):
            raise ValueError(
                f"layout 'native' cannot cut the router of {layer.name!r}: none of its matrices has {slots} rows. "
                "Use layout='mapped'."
            )
        for _, name in layer.family.expert_tables(layer) if drops_experts else ():
            raise ValueError(
                f"Dropped experts leave none for some tokens that {layer.router_name!r} looks up in {name}, "
                "and layout 'native' cannot skip them. Use layout='mapped', or merge."
            )


def counting_parts(
    model: PreTrainedModel, kept: Sequence[MoeLayer], excluded: Sequence[MoeLayer], num_experts: int
) -> set[str]:
    """Paths of the configurations whose expert counts must become M, found by building empty models from them.

    Args:
        model: The original model, on any device.
        kept: The layers that are compressed.
        excluded: The layers that keep their experts.
        num_experts: M.

    Raises:
        ValueError: No change of the configuration gives such a model.
    """
    num_slots = kept[0].num_slots
    parts = dict(config_parts(model.config))
    paths = {path for path, part in parts.items() if num_slots in _counts(part)}
    if num_experts == num_slots:
        return paths
    wanted = {x.name: num_experts for x in kept} | {x.name: x.num_experts for x in excluded}
    for name, first in tied_layers(find_layers(model)).items():
        wanted[name] = wanted[first.name]
    if excluded:
        names = {name for name, number in wanted.items() if number == num_experts}
        found = {path: _experts_of_layer(model, {path}, num_slots, num_experts) for path in paths}
        paths = {
            path for path, experts in found.items() if {n for n, x in experts.items() if x == num_experts} <= names
        }
    if not paths or _experts_of_layer(model, paths, num_slots, num_experts) != wanted:
        what = f" while {excluded[0].name!r} keeps {excluded[0].num_experts}" if excluded else ""
        raise ValueError(
            f"The configuration {type(model.config).__name__} cannot say that {kept[0].name!r} has {num_experts} "
            f"experts{what}. Use layout='mapped'."
        )
    return paths


def _counts(config: PreTrainedConfig) -> set[int]:
    return {read_attribute((name,), config) for name in NUM_EXPERTS_NAMES} - {None}


def _experts_of_layer(model: PreTrainedModel, paths: set[str], num_slots: int, num_experts: int) -> dict[str, int]:
    """Experts of each layer, by name, of a model built with the counts in the configurations at `paths` changed."""
    config = copy.deepcopy(model.config)
    for path, part in config_parts(config):
        if path in paths:
            rename_counts(part, num_slots, num_experts)
    try:
        with torch.device("meta"):
            built = type(model)._from_config(config)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be built with {num_experts} experts: {error}. Use layout='mapped'."
        ) from error
    return {layer.name: layer.num_experts for layer in find_layers(built)}


def adopt_counts(model: PreTrainedModel, layers: Sequence[MoeLayer], paths: set[str], num_experts: int) -> None:
    """Write the new number of experts wherever the model and its configurations say the old one.

    Args:
        model: With compressed layers.
        layers: The compressed layers, as they were found.
        paths: From `counting_parts`.
        num_experts: M.
    """
    num_slots = layers[0].num_slots
    parts = [part for path, part in config_parts(model.config) if path in paths]
    # Modules may hold copies of their part of the configuration, and copies of its numbers.
    kinds = tuple({type(part) for part in parts})
    spoken_for = [m for m in model.modules() if isinstance(getattr(m, "config", None), kinds)]
    inside = chain.from_iterable(layer.block.modules() for layer in layers)
    paths_around = {name for layer in layers for name in accumulate(layer.name.split("."), "{}.{}".format)}
    around = [m for m in map(model.get_submodule, sorted(paths_around)) if not hasattr(m, "config")]
    owners = [*parts, *(m.config for m in spoken_for), *spoken_for, *inside, *around]
    for owner in {id(owner): owner for owner in owners}.values():
        rename_counts(owner, num_slots, num_experts)
