"""Forwards of a model that run no layer in vain: they end where no later one is looked at, or go on from there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..families import reading_part
from ..types import MoeLayer
from .decoder_stack import DecoderStack
from .shards import NotStreamableError
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
    if has_offload(model):
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


class ContinuedForwards:
    """Forwards for layers that are visited from the first to the last and change in between.

    Each begins with the decoder layer of the last visit, on what that one was given before: all layers run twice, to
    be looked at and once they have changed, however many there are. Memory: the hidden states of the calibration
    tokens, in RAM.

    Args:
        model: Nothing in it is offloaded.
        layers: Those to visit.

    Raises:
        NotStreamableError: Here or in a forward: layers pass on more than hidden states, see `DecoderStack`.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[MoeLayer]):
        self.stack = DecoderStack(model, layers)
        self.first = 0  # the decoder layer that the next forward begins with
        self.given: dict[int, Tensor] = {}  # to it, by the position of the batch; nothing to layer 0

    @contextmanager
    def until(self, layers: Sequence[MoeLayer]) -> Iterator[Callable[[int, dict[str, Any]], Any]]:
        """Within the context, what runs one batch up to the last of some layers, for `collect`; each batch once.

        Afterwards the first of them may change, and so may all behind it.
        """
        places = [self.stack.index_of(f"{layer.name}.") for layer in layers]
        first, begin, given = min(places), self.first, {}
        with self.stack.between(begin, max(places)) as run:

            def forward(position: int, inputs: dict[str, Any]) -> None:
                run(self.given.pop(position, None), **inputs)
                if first > 0:
                    given[position] = run.received[first - begin].cpu()

            yield forward
        self.first, self.given = first, given


def continued_forwards(model: PreTrainedModel, layers: Sequence[MoeLayer]) -> ContinuedForwards | None:
    """Those of a model, or None where its layers cannot run one after another by themselves."""
    try:
        return None if has_offload(model) else ContinuedForwards(model, layers)
    except NotStreamableError:
        return None


def has_offload(model: PreTrainedModel) -> bool:
    """Whether weights of a model are put on their device for each forward."""
    return any(has_offloaded_params(module) for module in model.modules())
