"""From the mapped to the native layout: the tensors of the plain model that a mapped one becomes."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from ..families import find_layers
from ..routing.treatments import TREATMENTS
from ..types import ExpertGroups, ExpertWeights, MoeLayer
from .experts import rename_counts, slot_axis
from .native_config import config_parts
from .native_width import NativeFields


@dataclass(frozen=True, eq=False)
class RouterCut:
    """How the router of one layer is cut."""

    groups: ExpertGroups
    usage_frequency: Tensor  # (N,) float64
    treatment: str  # its name in TREATMENTS
    options: Mapping[str, Any]

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """(N, ...) -> (M, ...), in the same dtype.

        Raises:
            ValueError: The treatment gave something else.
        """
        made = TREATMENTS[self.treatment](name, tensor, self.groups, self.usage_frequency, **self.options)
        expected = (self.groups.num_groups, *tensor.shape[1:])
        if tuple(made.shape) != expected or made.dtype != tensor.dtype:
            raise ValueError(
                f"Router treatment {self.treatment!r} made {made.dtype} {tuple(made.shape)} of {name!r}, expected "
                f"{tensor.dtype} {expected}. Mend the treatment."
            )
        return made


@torch.no_grad()
def native_tensors(
    model: PreTrainedModel, cuts: Mapping[str, RouterCut], width: int, layer_done: Callable[[], Any] = lambda: None
) -> dict[str, Tensor]:
    """The state dict of the native model.

    Args:
        model: Mapped, with dense experts (see `densify`), on any device. It is left as it is; tensors that do not
            change are shared with it.
        cuts: By the path of the experts module, for every compressed layer.
        width: Neurons that all experts of these layers get: neurons of zeros are added or taken away at the end.
        layer_done: Called after each layer.

    Raises:
        ValueError: The model has no dense layer at one of the paths, an expert has more than `width` neurons that are
            not zero, or a table of a router names a dropped expert.
    """
    tensors = dict(model.state_dict())
    layers = {layer.name: layer for layer in find_layers(model)}
    missing = sorted(set(cuts) - set(layers))
    if missing:
        raise ValueError(f"{type(model).__name__} has no dense experts at {missing[0]!r}. Call densify(model) first.")
    for name, cut in cuts.items():
        layer = layers[name]
        del tensors[f"{name}.expert_map.index"]
        tensors |= {f"{name}.{key}": value for key, value in resized_experts(layer, width).items()}
        if cut.groups.num_groups < layer.num_slots:
            tensors |= cut_router(layer, cut, tensors)
        layer_done()
    return tensors


def resized_experts(layer: MoeLayer, width: int) -> dict[str, Tensor]:
    """The expert parameters of a layer at another width; {} where they have it already."""
    stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
    weights = layer.family.view(layer, stacked)
    if weights.width == width:
        return {}
    return layer.family.unstack(layer, layer.family.unview(layer, resize(weights, width)))


def resize(weights: ExpertWeights, width: int) -> ExpertWeights:
    """The same functions with neurons of zeros added at the end of each expert, or taken away there.

    Raises:
        ValueError: A neuron that would be taken away is not zero.
    """
    more = width - weights.width
    if more < 0 and any(weights.neurons(expert)[width:].any() for expert in range(weights.num_experts)):
        raise ValueError(f"width is {width}, but the experts have {weights.width} neurons. Use at least that.")
    amounts = {"down": (0, more), "gate": (0, 0, 0, more), "up": (0, 0, 0, more), "down_bias": (0, 0)}
    return ExpertWeights(**{name: pad(t, amounts.get(name, (0, more))) for name, t in weights.tensors().items()})


def cut_router(layer: MoeLayer, cut: RouterCut, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the tensors of a router, and of the block around it, become that have one entry per slot.

    Args:
        layer: Mapped.
        cut: What to make of N entries. Entries after these, of slots without a routed expert, stay.
        tensors: State dict of the model.

    Raises:
        ValueError: A table of the router names an expert that was dropped.
    """
    group_of_expert, new = cut.groups.group_of_expert, {}
    tables = {(id(module), name) for module, name in layer.family.expert_tables(layer)}
    owners = [(f"{layer.router_name}.{path}" if path else layer.router_name, m) for path, m in router_modules(layer)]
    for path, module in [*owners, (layer.block_name, layer.block)]:
        for name in [*module._parameters, *module._buffers]:
            key = f"{path}.{name}"
            if key not in tensors:
                continue  # None, or not saved
            if (id(module), name) not in tables:
                new[key] = cut_tensor(name, tensors[key], layer, cut)
                continue
            table = group_of_expert.to(tensors[key].device)[tensors[key].long()]
            if (table < 0).any():
                raise ValueError(
                    f"{name} of {layer.router_name!r} leads tokens to experts that were dropped, and a native router "
                    "cannot skip them. Keep the mapped layout, or merge experts instead of dropping them."
                )
            new[key] = table.to(tensors[key].dtype)
    return new


def router_modules(layer: MoeLayer) -> list[tuple[str, nn.Module]]:
    """The modules of a router with their paths in it, without experts that may lie inside."""
    inside = {id(module) for module in layer.experts.modules()}
    return [(path, module) for path, module in layer.router.named_modules() if id(module) not in inside]


def cut_tensor(name: str, tensor: Tensor, layer: MoeLayer, cut: RouterCut) -> Tensor:
    """A tensor with the entries of its slots cut; the tensor itself if it has no such entries."""
    slots = layer.num_slots
    for size in {slots: None, slots + layer.num_passive_rows: None}:
        axis = slot_axis(tensor, size)
        if axis is not None:
            entries = tensor.movedim(axis, 0)
            return torch.cat([cut(name, entries[:slots]), entries[slots:]]).movedim(0, axis).contiguous()
    return tensor


def native_config(
    config: PreTrainedConfig, fields: NativeFields, num_slots: int, num_experts: int, width: int
) -> PreTrainedConfig:
    """A copy of the original configuration that says M experts of a width where it said N of the original width."""
    config = copy.deepcopy(config)
    parts = dict(config_parts(config))
    for path in fields.counting_parts:
        rename_counts(parts[path], num_slots, num_experts)
    for path, name in fields.width_fields:
        setattr(parts[path], name, width)
    return config


def native_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A plain model with given weights, to be saved: what is not saved (rotary frequencies, ...) stays empty.

    Raises:
        ValueError: The tensors are not exactly those of such a model.
    """
    with torch.device("meta"):
        model = model_class._from_config(config)
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights do not fit a plain {model_class.__name__}: {error} Keep the mapped layout."
        ) from error
    model.tie_weights()
    return model.eval()
