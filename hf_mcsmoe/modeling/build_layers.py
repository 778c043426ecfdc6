"""Layers of the original architecture become those of a compressed checkpoint, with values still to come."""

from typing import Any

from transformers import PreTrainedModel

from ..families import find_layers
from ..types import MoeLayer
from .experts import attach_expert_map, is_same_layer, shrink_experts
from .forms import FORMS, check_forms


def build_merged_layers(model: PreTrainedModel, layers: dict[str, dict[str, Any]]) -> None:
    """Shrink the experts of a freshly built model to what the layout says and attach empty maps.

    Layer names are those of the model that was compressed; a model with another head or none may have them
    under a shorter or longer prefix.

    Raises:
        ValueError: The model does not have exactly the layers that the checkpoint describes.
    """
    found = find_layers(model)
    for name, layout in layers.items():
        candidates = [layer for layer in found if is_same_layer(name, layer.name)]
        if len(candidates) != 1 or candidates[0].num_slots != layout["num_slots"]:
            raise ValueError(
                f"The checkpoint describes the MoE layer {name!r} with {layout['num_slots']} slots, but "
                f"{type(model).__name__} has {[(x.name, x.num_slots) for x in candidates]} there. "
                "The configuration does not belong to this architecture."
            )
        build_merged_layer(candidates[0], layout)


def build_merged_layer(layer: MoeLayer, layout: dict[str, Any]) -> None:
    """Give a layer of the original architecture the experts that its entry in a layout says, and an empty map."""
    form = layout.get("form")
    if form is None:
        shrink_experts(layer, layout["num_experts"], layout.get("intermediate_size"))
    else:
        check_forms(layer)
        FORMS[form].build(layer, layout)
    attach_expert_map(layer, layout)
