"""LoRA on a compressed model: which modules and parameters PEFT should adapt, found through the families."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ..families import find_layers
from ..modeling.forms import form_layers

ATTENTION_NAME = re.compile(r"(attn|attention)(\.|$)", re.IGNORECASE)
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
NOT_ADAPTED = ("bias", "_sparse")  # biases of all experts stacked, kept rows: a low-rank change of them means nothing


def lora_config(
    model: PreTrainedModel,
    *,
    r: int = 8,
    lora_alpha: int | None = None,
    attention: bool = True,
    experts: bool = True,
    routers: bool = True,
    **changes: Any,
) -> LoraConfig:
    """A `LoraConfig` that recovers a model with few trained numbers: attention, experts and router rows.

    LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) on the linear layers of the attention and on the
    experts. Experts that are linear layers (Switch Transformers) are `target_modules`; those that are parameters are
    `target_parameters`, where PEFT gives each expert of a 3-D parameter a pair of rank `r` of its own. Decomposed
    experts get it on their left and right factors, their kept rows stay as they are; all neurons of ragged experts
    together are one matrix with one pair of rank `r` in all. Routers are small and trained whole: they
    are `modules_to_save`, with all N rows, whatever M is. The expert map is a buffer that no adapter touches. Works
    before and after compression, on mapped and on native models.

    Args:
        model: With MoE layers; loaded the way it will be for the adapter later. It is only looked at.
        r: Rank of each pair.
        lora_alpha: Scale, divided by `r` in the forward; None takes 2 r.
        attention: Adapt the attention of the stacks of blocks that have experts (not an image encoder beside).
        experts: Adapt the experts.
        routers: Train the routers.
        changes: Other fields of `LoraConfig`. `target_modules`, `target_parameters` and `modules_to_save` add to
            what was found.

    Returns:
        A configuration for `peft.get_peft_model`. Names are endings of paths that fit nothing else.

    Raises:
        ValueError: The model has no MoE layer, LoRA would adapt nothing, experts are flat matrices (DBRX), or LoRA
            dropout is wanted for experts that are parameters; both PEFT cannot do.
    """
    places = find_places(model)
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer that hf_mcsmoe knows, so there is nothing to find. "
            "Use peft.LoraConfig with names of your own."
        )
    flat = [place.experts_name for place in places if not place.linear and not place.tensors]
    if experts and flat:
        raise ValueError(
            f"The experts of {flat[0]!r} are flat matrices that are read from outside of their module, where PEFT "
            "cannot adapt them. Use experts=False."
        )
    modules = attention_modules(model, places) if attention else set()
    modules |= {name for place in places for name in place.linear} if experts else set()
    parameters = {name for place in places for name in place.tensors} if experts else set()
    routers_found = {place.router_name for place in places} if routers else set()
    module_names = [name for name, _ in model.named_modules()]
    parameter_names = [name for name, _ in model.named_parameters()]
    targets = [*endings(modules, module_names), *(changes.pop("target_modules", None) or ())]
    target_parameters = [*endings(parameters, parameter_names), *(changes.pop("target_parameters", None) or ())]
    saved = [*endings(routers_found, module_names), *(changes.pop("modules_to_save", None) or ())]
    if not targets and not target_parameters:
        raise ValueError(
            "attention and experts are both False, so LoRA adapts nothing. Set one of them to True, or name "
            "target_modules."
        )
    if target_parameters and changes.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout is {changes['lora_dropout']}, but PEFT cannot drop inputs of experts that are parameters "
            f"({target_parameters[0]!r}, ...). Leave lora_dropout out, or use experts=False."
        )
    return LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        target_modules=targets,
        target_parameters=target_parameters or None,
        modules_to_save=saved or None,
        **changes,
    )


@dataclass(frozen=True)
class AdapterPlaces:
    """Where the adapters of one MoE layer go, as paths in the model."""

    experts_name: str
    block_name: str
    router_name: str
    linear: tuple[str, ...]  # experts that are linear layers
    tensors: tuple[str, ...]  # matrices of experts that are parameters by themselves


def find_places(model: nn.Module) -> list[AdapterPlaces]:
    """The places of all MoE layers of a model, dense experts and other forms."""
    places = []
    for layer in find_layers(model):
        linear = tuple(name for name, m in layer.experts.named_modules(prefix=layer.name) if isinstance(m, nn.Linear))
        paths = {f"{layer.name}.{name}": p for name, p in layer.expert_parameters.items()}
        tensors = tuple(
            path
            for path, p in paths.items()
            if p.dim() > 2 and path.rpartition(".")[0] not in linear  # biases of all experts stacked are (M, ...)
        )
        places.append(AdapterPlaces(layer.name, layer.block_name, layer.router_name, linear, tensors))
    for name, experts in form_layers(model).items():
        matrices = {tensor for tensor, p in experts.named_parameters(recurse=False) if p.dim() > 1}
        tensors = tuple(f"{name}.{tensor}" for tensor in sorted(matrices) if not tensor.endswith(NOT_ADAPTED))
        layer = experts.dense_layer
        places.append(AdapterPlaces(name, layer.block_name, layer.router_name, (), tensors))
    return places


def attention_modules(model: nn.Module, places: Iterable[AdapterPlaces]) -> set[str]:
    """Paths of the linear layers of attention modules in the stacks of blocks that `places` are in."""
    stacks = tuple({stack_of(place.block_name) for place in places})
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith(stacks)}
    return {name for name in found if is_in_attention(model, name)}


def is_in_attention(model: nn.Module, path: str) -> bool:
    """Whether a linear layer is of an attention, by the modules it is in or the class of the one that holds it.

    Gates of attention that are called like the gates of experts are left out: PEFT takes these names for experts of
    checkpoints of transformers 4 and looks for them elsewhere.
    """
    owner, _, name = path.rpartition(".")
    held_by = ATTENTION_NAME.search(owner) or "attention" in type(model.get_submodule(owner)).__name__.lower()
    return bool(held_by) and name not in EXPERT_NAMES


def stack_of(name: str) -> str:
    """The path up to its first number, with the dot before it: "model.layers." of "model.layers.0.mlp"."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:first]) + "." if first else ""


def endings(wanted: set[str], names: Iterable[str]) -> list[str]:
    """The shortest endings of the paths `wanted` that no other of `names` has.

    PEFT takes the end of a path for its name. A path that has no such ending comes whole.
    """
    others = set(names) - wanted
    found = set()
    for path in wanted:
        parts = path.split(".")
        shorter = (".".join(parts[-length:]) for length in range(1, len(parts)))
        found.add(next((end for end in shorter if not any(one.endswith(end) for one in others)), path))
    return sorted(found)
