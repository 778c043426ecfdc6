"""What all forms share: taking the place of a layer's dense experts, and the choice of an implementation."""

import copy
import dataclasses
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...registry import Registry
from ...types import ExpertWeights, MoeLayer
from ..offload import add_tensor, execution_device, remove_tensor

FORMS = Registry("expert form")
ACCELERATE_ATTRIBUTES = ("forward", "_old_forward", "_hf_hook")


class ExpertForm:
    """Mixin in front of the class of an experts module whose dense parameters are gone.

    The module stays the object it was: its hooks (the expert map's, Accelerate's), `config` and activation work on.
    Index M of a routed slot is skipped by every implementation.
    """

    form: ClassVar[str]  # its name in FORMS
    class_prefix: ClassVar[str]
    # name in `config._experts_implementation` -> function (module, hidden_states, index, weights) -> output
    implementations: ClassVar[dict[str, Callable]]
    dense_layer: MoeLayer  # the layer as the original model had it, on the meta device, without router and block
    expert_activation: Callable[[Tensor, Tensor | None], Tensor]

    @classmethod
    def build(cls, layer: MoeLayer, layout: dict[str, Any]) -> None:
        """Make the experts of a freshly built layer empty ones of this form, on any device (meta included).

        Args:
            layer: With the dense experts of the original architecture.
            layout: The layer's entry in the configuration of a mapped checkpoint.
        """
        raise NotImplementedError

    @property
    def num_stored(self) -> int:
        """M, the experts that the module holds."""
        raise NotImplementedError

    def layout(self) -> dict[str, Any]:
        """What the layer's entry in the layout says about this form: all that `build` needs."""
        raise NotImplementedError

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Parameters that all experts share: a token uses them once, however many experts it has."""
        return ()

    def densify(self) -> ExpertWeights:
        """The experts as dense matrices of one width: the same function up to rounding."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Weighted sum of the outputs of each token's experts; called as the original experts are.

        Returns:
            (T, D) in the dtype of the hidden states.

        Raises:
            ValueError: The configuration asks for an implementation that this form does not have.
        """
        hidden_states, index, weights = self.dense_layer.family.routed_inputs(args, kwargs)
        return self.implementation(hidden_states, index, weights)

    @property
    def implementation(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The function that `config._experts_implementation` names; eager where the experts have no configuration."""
        name = getattr(getattr(self, "config", None), "_experts_implementation", None) or "eager"
        if name not in self.implementations:
            raise ValueError(
                f"Experts implementation {name!r} cannot run experts of the form {self.form!r}, only "
                f"{sorted(self.implementations)} can. Call model.set_experts_implementation('grouped_mm')."
            )
        return functools.partial(self.implementations[name], self)

    def finish(self, output: Tensor) -> Tensor:
        """What the family does to the outputs of experts (S, D) besides weighting them."""
        return self.dense_layer.family.finish(self, output)

    def restore_class(self) -> None:
        """Be of the original class again, without what the form added except for its tensors."""
        for name in ("dense_layer", "expert_activation", "_host_integers"):
            self.__dict__.pop(name, None)
        change_class(self, type(self).__bases__[1])

    def host_integers(self, name: str) -> list[int]:
        """A buffer of sizes as Python integers; read from the device once, and again when it was replaced."""
        buffer, cache = getattr(self, name), self.__dict__.setdefault("_host_integers", {})
        known = cache.get(name)
        if known is None or known[0] is not buffer or known[1] != buffer._version:
            cache[name] = (buffer, buffer._version, buffer.tolist())
        return cache[name][2]


def check_forms(layer: MoeLayer) -> None:
    """Refuse a layer whose experts cannot have another form than dense.

    Raises:
        ValueError: With the reason.
    """
    reason = layer.family.no_forms_because(layer)
    if not reason and (layer.num_identity_slots or layer.passive_expert_rows):
        reason = "they answer some slots without using an expert"
    if reason:
        raise ValueError(
            f"The experts of {layer.name!r} cannot be decomposed or have different widths: {reason}. "
            "Leave the layer out with exclude_layers, or use a recipe that merges or drops whole experts."
        )


def form_layers(model: nn.Module) -> dict[str, ExpertForm]:
    """The experts modules of a model that are not dense, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertForm)}


def form_class(form: type[ExpertForm], experts_class: type[nn.Module]) -> type:
    """The class of `experts_class` modules in a form, made once and kept in this module."""
    name = form.class_prefix + experts_class.__name__
    module = sys.modules[__name__]
    made = getattr(module, name, None)
    if made is None or made.__bases__ != (form, experts_class):
        document = f"`{experts_class.__name__}` whose experts have the form {form.form!r}."
        made = type(name, (form, experts_class), {"__module__": __name__, "__doc__": document})
        setattr(module, name, made)
    return made


def become(
    layer: MoeLayer, form: type[ExpertForm], parameters: dict[str, Tensor], buffers: dict[str, Tensor]
) -> ExpertForm:
    """Take the dense experts out of a layer and put those of a form in their place; in place.

    The parameters get the dtype of the layer's experts. Where Accelerate offloads them, so it does the new ones,
    except for experts that were modules of their own (Switch Transformers): theirs stay on the execution device.

    Args:
        layer: With dense experts; `check_forms` was passed.
        form: One of `FORMS`.
        parameters: By name, any floating dtype; empty ones on the meta device stay there.
        buffers: By name, with their dtype.

    Returns:
        `layer.experts`, which is a module of the form now.
    """
    experts, old = layer.experts, layer.expert_parameters
    dense_experts = meta_copy(experts)
    activation = layer.family.activation(layer)
    first = next(iter(old.values()))
    hooked = next((module for module in experts.modules() if hasattr(module, "_hf_hook")), None)
    device = first.device if hooked is None else execution_device(hooked)
    for child in {path.partition(".")[0] for path in old if "." in path}:
        delattr(experts, child)
    for name in [path for path in old if "." not in path]:
        remove_tensor(experts, name)
    # In one order, however they were made: PEFT nests adapters of parameters in the order of registration.
    for name, value in sorted((parameters | buffers).items()):
        is_parameter = name in parameters
        value = value.detach().to(device=device, dtype=first.dtype if is_parameter else None)
        add_tensor(experts, name, owned(value), requires_grad=first.requires_grad if is_parameter else None)
    change_class(experts, form_class(form, type(experts)))
    experts.expert_activation = activation
    experts.dense_layer = dataclasses.replace(layer, experts=dense_experts, router=None, block=None)
    # transformers' initialization would look for the dense parameters.
    experts._is_hf_initialized = layer.block._is_hf_initialized = True
    return experts


def owned(value: Tensor) -> Tensor:
    """`value`, contiguous and alone in its memory: a view would keep the dense experts alive."""
    value = value.contiguous()
    return value if value.is_meta or value.untyped_storage().nbytes() == value.nbytes else value.clone()


def change_class(experts: nn.Module, new_class: type) -> None:
    """Make `experts` an instance of another class, also where Accelerate has wrapped the forward that it had."""
    experts.__class__ = new_class
    if "_old_forward" in experts.__dict__:
        experts._old_forward = types.MethodType(new_class.forward, experts)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, without hooks."""
    clone = type(module).__new__(type(module))
    clone.__dict__.update({k: v for k, v in module.__dict__.items() if k not in ACCELERATE_ATTRIBUTES})
    for name, value in vars(nn.Module()).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            clone.__dict__[name] = copy.copy(value) if value is None else OrderedDict()
    clone._parameters = {
        name: p if p is None else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        for name, p in module._parameters.items()
    }
    clone._buffers = {name: b if b is None else b.to("meta") for name, b in module._buffers.items()}
    clone._modules = {name: meta_copy(child) for name, child in module.named_children()}
    return clone


def empty_parameters(shapes: dict[str, tuple[int, ...]], layer: MoeLayer) -> dict[str, Tensor]:
    """Parameters of a freshly built form: on the meta device without values, elsewhere random as transformers does."""
    first = next(iter(layer.expert_parameters.values()))
    config = getattr(layer.experts, "config", None)
    deviation = getattr(config, "initializer_range", None) or 0.02
    made = {name: torch.empty(shape, device=first.device, dtype=first.dtype) for name, shape in shapes.items()}
    return made if first.is_meta else {name: tensor.normal_(0.0, deviation) for name, tensor in made.items()}
