"""Whether what the experts of a layer give is added to the residual stream as it is."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..families import forward_call
from ..families.residual import first_tensor
from ..types import MoeLayer
from .in_memory import cheap_forward, input_device, to_device
from .stream_outputs import decoder_layer, refusal

UNIT_TOLERANCE = 0.01  # of the share of the routed output that the stream gets, and of what it gets beside it
ROUNDINGS = 8  # of the stream's dtype, that a layer may add to its output


class UnfollowedStreamError(ValueError):
    """The targets of a recipe are those of a residual stream that cannot be followed."""


class UnitCheck:
    """Whether the routed output of a layer is added to the stream as it is, neither scaled nor normalised.

    On the first call where its experts answer, the decoder layer runs once more with their output doubled: that must
    add their output to what it gives.

    Args:
        model: Holds the layer.
        layer: Whose experts are called with slots and weights.
    """

    def __init__(self, model: PreTrainedModel, layer: MoeLayer):
        self.layer, self.around = layer, decoder_layer(model, layer)
        self.is_done = self.is_doubling = False
        self._routed: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context a forward of the model is checked.

        Raises:
            UnfollowedStreamError: In the forward: the routed output is not added as it is.
        """
        handles = [
            self.layer.experts.register_forward_hook(self._on_experts),
            self.around.register_forward_hook(self._on_layer, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_experts(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:  # noqa: ARG002
        if self.is_doubling:
            return output + output
        self._routed = output.detach()
        return output

    def _on_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.is_done or self.is_doubling or self._routed is None or not self._routed.any():
            return
        stream, self.is_doubling = first_tensor(output), True
        try:
            doubled = first_tensor(module.forward(*args, **kwargs))
        finally:
            self.is_doubling = False
        self.is_done = True
        if not is_unit(stream, doubled, self._routed.reshape(stream.shape)):
            raise UnfollowedStreamError(refusal(self.layer, "what its experts give is changed before it is added"))


@torch.no_grad()
def check_units(model: PreTrainedModel, layers: Sequence[MoeLayer], data: Calibration) -> None:
    """Run as many batches as it takes to see the experts of all layers answer, mostly one.

    Raises:
        UnfollowedStreamError: The routed output of a layer is scaled or normalised before the residual stream gets it.
    """
    checks = [UnitCheck(model, layer) for layer in layers]
    with ExitStack() as stack:
        for check in checks:
            stack.enter_context(check.attached())
        for batch in data.batches:
            inputs = {name: to_device(value, input_device(model)) for name, value in batch.inputs.items()}
            called, inputs = forward_call(model, inputs)
            called(**inputs, **cheap_forward(called))
            if all(check.is_done for check in checks):
                return


def is_unit(before: Tensor, after: Tensor, added: Tensor) -> bool:
    """Whether `after` is `before + added` up to roundings of their dtype; all of one shape, any dtype."""
    rounding = ROUNDINGS * torch.finfo(before.dtype).eps * (before.float().norm() + after.float().norm())
    before, after, added = before.float(), after.float(), added.float()
    change, energy = after - before, added.square().sum()
    share = (change * added).sum() / energy
    is_whole = (share - 1).abs() <= UNIT_TOLERANCE
    return bool(is_whole & ((change - added).norm() <= UNIT_TOLERANCE * energy.sqrt() + rounding))
