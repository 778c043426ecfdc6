"""A forward of a model that ends where no later layer is looked at."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import PreTrainedModel

from ..families import reading_part
from ..types import MoeLayer
from .stream_outputs import decoder_layer


class AllSeen(Exception):
    """Ends a forward once all layers that are looked at have given their output."""


def forward_until(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> Callable[[int, dict[str, Any]], Any] | None:
    """What runs a model on one batch up to the last of some layers, for `collect`; their hooks run before it ends.

    None, for the whole forward, where a layer has no decoder layer around it, or where weights are offloaded: the
    hooks that put them back on the disk run at the end of the modules that hold them.
    """
    try:
        around = {decoder_layer(model, layer) for layer in layers}
    except ValueError:
        return None
    if any(has_offloaded_params(module) for module in model.modules()):
        return None

    def forward(position: int, inputs: dict[str, Any]) -> None:  # noqa: ARG001
        left = set(around)

        def on_output(module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG001
            left.discard(module)
            if not left:
                raise AllSeen

        with ExitStack() as stack:
            for module in around:
                stack.callback(module.register_forward_hook(on_output).remove)
            try:
                reading_part(model)(**inputs)
            except AllSeen:
                pass

    return forward
