"""A compressed layer on its way from one process to the same layer of another, which is still the original."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn

from ..types import LayerReport, MoeLayer
from .build_layers import build_merged_layer
from .experts import first_experts, install_native
from .offload import execution_device, fetched, replace_tensor


def parts_of_layer(layer: MoeLayer) -> dict[str, tuple[nn.Module, bool]]:
    """The modules that compressing a layer may change, and whether only their own tensors are meant."""
    parts = {"experts": (layer.experts, False), "router": (layer.router, False), "block": (layer.block, True)}
    return parts if layer.shared is None else {**parts, "shared": (layer.shared.down, True)}


def tensors_of_layer(layer: MoeLayer) -> dict[str, Tensor]:
    """All tensors that compressing a layer may have changed, by part and name; offloaded ones are read."""
    found: dict[str, Tensor] = {}
    for part, (module, own_only) in parts_of_layer(layer).items():
        if own_only:
            named = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            found |= {f"{part}.{name}": tensor.detach() for name, tensor in named.items() if not tensor.is_meta}
            continue
        with fetched(module):
            found |= {f"{part}.{name}": tensor.detach() for name, tensor in module.state_dict().items()}
    return found


@torch.no_grad()
def adopt_layer(
    layer: MoeLayer, report: LayerReport, layout: Mapping[str, Any], tensors: Mapping[str, Tensor], *, is_native: bool
) -> None:
    """Make of an original layer what another process made of its own; in place.

    Args:
        layer: As found in the original model.
        report: What the other process did.
        layout: The layer's entry in the layout of a mapped checkpoint, complete.
        tensors: From `tensors_of_layer` there, on any device.
        is_native: The router was cut; else there is a map before the experts.
    """
    device = execution_device(layer.experts)
    if is_native:
        rows, group_of_expert = torch.tensor(report.dominant_of_group), torch.tensor(report.group_of_expert)
        width = report.widths[0] if report.widths[0] != layer.intermediate_size else None
        install_native(layer, first_experts(layer, report.num_experts_after, width), rows, group_of_expert)
    else:
        forget_values(layer)
        build_merged_layer(layer, dict(layout))
    modules = parts_of_layer(layer)
    for path, value in tensors.items():
        part, _, inside = path.partition(".")
        owner, _, name = inside.rpartition(".")
        replace_tensor(modules[part][0].get_submodule(owner), name, value.to(device))


def forget_values(layer: MoeLayer) -> None:
    """Put the experts of a layer on the meta device: what is built there takes no memory and draws no numbers."""
    for path in layer.expert_parameters:
        owner_name, _, name = path.rpartition(".")
        owner = layer.experts.get_submodule(owner_name)
        if not has_offloaded_params(owner):
            old = owner._parameters[name]
            owner._parameters[name] = nn.Parameter(old.detach().to("meta"), old.requires_grad)
