"""What becomes of experts that are not dense: rows of zeros dropped after training, or dense matrices again."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..types import ExpertWeights, MoeLayer
from .experts import is_same_layer
from .forms import ExpertForm, form_layers
from .forms.low_rank_sparse import LowRankSparseExperts
from .offload import add_tensor, execution_device, fetched, remove_tensor

FORM_KEYS = ("form", "num_neurons", "rank", "num_rows", "num_ranks")


def harden(model: PreTrainedModel) -> None:
    """Drop the kept rows that are all zero from all decomposed experts of a model, in place.

    The matrices stay exactly what they are. The configuration says the new sizes, so that the model can be saved.
    Make optimisers afterwards.
    """
    for name, experts in form_layers(model).items():
        if isinstance(experts, LowRankSparseExperts):
            changed = experts.harden()
            layout = layout_of(model, name)
            if layout is not None:
                layout |= changed


def densify(model: PreTrainedModel) -> None:
    """Make all experts of a model dense again, in place; see `densify_layer`."""
    for name in form_layers(model):
        densify_layer(model, name)


@torch.no_grad()
def densify_layer(model: PreTrainedModel, layer_name: str) -> None:
    """Make the experts of one layer dense again, in place: the same function up to rounding, behind the same map.

    Experts of different widths become as wide as the widest, with neurons of zeros; the layer's entry in the
    configuration says `intermediate_size` where that is not the original width. Decomposed matrices are multiplied
    out in float32 and rounded once.

    Args:
        model: With experts of some form, mapped.
        layer_name: Path of the experts module.

    Raises:
        ValueError: There are no such experts at that path.
    """
    experts = dict(model.named_modules()).get(layer_name)
    if not isinstance(experts, ExpertForm):
        raise ValueError(
            f"layer_name is {layer_name!r}, but the model has experts of another form than dense only at "
            f"{sorted(form_layers(model))}. Give one of these."
        )
    layer = experts.dense_layer
    with fetched(experts):
        weights = experts.densify()
    become_dense(experts, layer, weights)
    layout = layout_of(model, layer_name)
    if layout is not None:
        for key in FORM_KEYS:
            layout.pop(key, None)
        if weights.width != layer.intermediate_size:
            layout["intermediate_size"] = weights.width


def become_dense(experts: ExpertForm, layer: MoeLayer, weights: ExpertWeights) -> None:
    """Put dense experts in the place of those of a form: the inverse of `forms.base.become`.

    Args:
        experts: The module of the form.
        layer: Its `dense_layer`.
        weights: The M new experts, any width.
    """
    parameters = layer.family.unstack(layer, layer.family.unview(layer, weights))
    device = execution_device(experts)
    own = [name for name, _ in [*experts.named_parameters(recurse=False), *experts.named_buffers(recurse=False)]]
    made_by_form = [name for name in own if name not in dict(layer.experts.named_parameters(recurse=False))]
    requires_grad = any(parameter.requires_grad for parameter in experts.parameters(recurse=False))
    for name in made_by_form:
        remove_tensor(experts, name)
    experts.restore_class()
    for path, value in parameters.items():
        put_dense(experts, layer.experts, path, value.to(device), requires_grad)


def put_dense(experts: nn.Module, template: nn.Module, path: str, value: Tensor, requires_grad: bool) -> None:
    """Give `experts` the parameter at `path`, with the module around it taken from `template` if it is not there."""
    child, _, rest = path.partition(".")
    if rest and child not in experts._modules:
        experts.add_module(child, template.get_submodule(child).train(experts.training))
    owner_name, _, name = path.rpartition(".")
    owner = experts.get_submodule(owner_name)
    if name in owner._parameters:
        remove_tensor(owner, name)
    add_tensor(owner, name, value, requires_grad)
    if isinstance(owner, nn.Linear) and name == "weight":
        owner.out_features, owner.in_features = value.shape


def layout_of(model: nn.Module, layer_name: str) -> dict[str, Any] | None:
    """The entry of a layer in the layout of a mapped model; None for a model that is none yet."""
    layers = getattr(getattr(model, "config", None), "merged_sparse_moe", {}).get("layers", {})
    return next((layout for name, layout in layers.items() if is_same_layer(name, layer_name)), None)
