"""Running a few decoder layers of a model by the model's own forward, so that masks and positions are its own."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..families import reading_part
from ..types import MoeLayer
from .shards import NotStreamableError


class LayerDone(Exception):
    """Ends a forward once the last active layer has given its output."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


class DecoderStack:
    """The decoder layers of a model, of which one or a few at a time can run.

    The model's forward is called as usual. Layers before the active ones are skipped: they return a placeholder
    full of NaN. The first active layer gets the real hidden states in its place and whatever else the model passes it;
    the output of the last one is taken and the forward ends there, after its hooks. A model that passes on more than
    hidden states from layer to layer gives itself away: by a changed placeholder, by NaN in another argument, by a
    second output, or by a container that a layer writes into. Such a model is refused.

    Args:
        model: Its layers may be on the meta device, except the active ones and what runs before the layers.
        layers: Its MoE layers.

    Raises:
        NotStreamableError: The MoE layers are not in one list of decoder layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]):
        self.model = model
        self.name = stack_name(model, [layer.name for layer in layers])
        self.modules: list[nn.Module] = list(model.get_submodule(self.name))
        self.num_outputs: int | None = None  # of a tuple; None: layers return a tensor

    def __len__(self) -> int:
        return len(self.modules)

    def prefix(self, index: int) -> str:
        """What the names of a layer's tensors start with."""
        return f"{self.name}.{index}."

    def index_of(self, tensor_name: str) -> int | None:
        """The layer that a parameter or module belongs to; None outside of the stack."""
        match = re.match(rf"{re.escape(self.name)}\.(\d+)\.", tensor_name)
        return int(match.group(1)) if match else None

    @contextmanager
    def only(self, active: int) -> Iterator["ActiveLayers"]:
        """Within the context `run(hidden_states, **inputs)` gives the output of layer `active` for one batch."""
        with self.between(active, active) as run:
            yield run

    @contextmanager
    def between(self, first: int, last: int) -> Iterator["ActiveLayers"]:
        """Within the context `run(hidden_states, **inputs)` gives the output of layer `last` for one batch.

        `hidden_states` is what the layer before `first` gave, on any device; None for layer 0, which is given what the
        model gives it. `inputs` are those of the model.
        """
        run = ActiveLayers(self, first, last)
        overridden = self.modules[: last + 1]
        before = [vars(module).get("forward") for module in overridden]  # that of a hook of accelerate, mostly none
        for place, module in enumerate(overridden):
            # An attribute of the instance: the module keeps its place, its other attributes and its hooks.
            module.forward = run.skip if place < first else partial(run.compute, place - first)
        try:
            yield run
        finally:
            for module, forward in zip(overridden, before, strict=True):
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


class ActiveLayers:
    """A few neighbouring layers of a stack, see `DecoderStack.between`."""

    def __init__(self, stack: DecoderStack, first: int, last: int):
        self.stack = stack
        self.name = f"{stack.name}.{first}"
        self.is_first = first == 0
        self.last = stack.modules[last]
        self.forwards = [module.forward for module in stack.modules[first : last + 1]]
        self.received: list[Tensor | None] = [None] * len(self.forwards)  # by each, for the latest batch
        self.given: Tensor | None = None
        self.placeholder: Tensor | None = None
        self.is_checked = False

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor | None, **inputs: Any) -> Tensor:
        """The output for one batch."""
        self.given, self.placeholder = hidden_states, None
        handle = self.last.register_forward_hook(end)  # after the hooks of all others, so that these still run
        try:
            reading_part(self.stack.model)(**inputs)
        except LayerDone as done:
            self.is_checked = True
            return self._hidden_states(done.output)
        finally:
            handle.remove()
        raise NotStreamableError(f"its forward does not run {self.name!r}")

    def skip(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the forward of an earlier layer."""
        received = args[0] if args else kwargs["hidden_states"]
        if self.placeholder is None:
            self.placeholder = received.new_full((), float("nan")).expand(received.shape)
        elif received is not self.placeholder:
            raise NotStreamableError(f"it changes the hidden states between the layers before {self.name!r}")
        count = self.stack.num_outputs
        return self.placeholder if count is None else (self.placeholder, *[None] * (count - 1))

    def compute(self, place: int, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the forward of the active layer at `place` among them."""
        hidden_states = args[0] if args else kwargs.pop("hidden_states")
        others = (args[1:], kwargs)
        if place == 0 and not self.is_first:
            hidden_states = self._given_instead_of(hidden_states, others)
        self.received[place] = hidden_states
        before = contents(others)
        output = self.forwards[place](hidden_states, *args[1:], **kwargs)
        if not self.is_checked and contents(others) != before:
            raise NotStreamableError(f"{self.name!r} leaves something for later layers in its arguments")
        return output

    def _given_instead_of(self, received: Tensor, others: tuple[tuple, dict[str, Any]]) -> Tensor:
        """What the first active layer works on; refuses what would need the layers before it for more."""
        if received is not self.placeholder:
            raise NotStreamableError(f"it changes the hidden states before {self.name!r}")
        if not self.is_checked:
            leaves = (leaf for leaf in tree_leaves(others) if isinstance(leaf, Tensor) and leaf.is_floating_point())
            if any(leaf.isnan().any() for leaf in leaves):
                raise NotStreamableError(f"{self.name!r} is given more from the layers before it than hidden states")
        return self.given.to(received.device)

    def _hidden_states(self, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        if not isinstance(output, tuple) or any(one is not None for one in output[1:]):
            raise NotStreamableError(f"{self.name!r} gives more to the next layer than hidden states")
        self.stack.num_outputs = len(output)
        return output[0]


def end(module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG001
    """A hook that ends a forward."""
    raise LayerDone(output)


def contents(arguments: tuple[tuple, dict[str, Any]]) -> list[Any]:
    """What the containers among some arguments hold, by identity, to see whether a layer writes into one."""
    found = []
    for value in (*arguments[0], *arguments[1].values()):
        if isinstance(value, dict):
            found.append({key: id(one) for key, one in value.items()})
        elif isinstance(value, list):
            found.append([id(one) for one in value])
        elif value is not None and not isinstance(value, Tensor | tuple | str | int | float):
            found.append({key: id(one) for key, one in getattr(value, "__dict__", {}).items()})
    return found


def stack_name(model: PreTrainedModel, names: Sequence[str]) -> str:
    """Path of the list of decoder layers that holds all modules in `names`.

    Raises:
        NotStreamableError: There is no such list, or its layers share weights.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotStreamableError("it is an encoder-decoder")
    paths = set()
    for name in names:
        parts = name.split(".")
        numbered = (position for position, part in enumerate(parts) if part.isdigit())
        lists = (".".join(parts[:position]) for position in numbered)
        paths.add(next((path for path in lists if isinstance(model.get_submodule(path), nn.ModuleList)), None))
    if len(paths) != 1 or None in paths:
        raise NotStreamableError("its MoE layers are not in one list of decoder layers")
    path = paths.pop()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if any(name.startswith(f"{path}.") for pair in tied.items() for name in pair):
        raise NotStreamableError("its decoder layers share weights")
    return path
