"""Where the residual stream around an MoE block is, for what compares it before and after the routed experts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..types import MoeLayer


class ResidualStream:
    """What the routed output of one layer is added to, read by hooks while the model runs.

    Nearly all decoder layers do `x + block(norm(x))`: the block's input is the very tensor that a norm gave, and that
    norm's input is x. Both is checked: the first at every call, the sum once.

    Args:
        model: Holds the layer.
        layer: With a block that is not the decoder layer itself.

    Raises:
        ValueError: The block has nothing around it that could add a residual.
    """

    def __init__(self, model: nn.Module, layer: MoeLayer):
        self.layer = layer
        self.around = check_residual(model, layer)
        self.value: Tensor | None = None  # (T, D) of the present call
        self._last: tuple[Any, Any] = (None, None)  # input and output of the module that ran last
        self._added: Tensor | None = None  # what the block gave
        self._is_checked = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context `value` is set when the block runs."""
        inside = set(self.layer.block.modules()) | {self.around}
        outside = [module for module in self.around.modules() if module not in inside]
        handles = [module.register_forward_hook(self._on_module) for module in outside]
        handles.append(self.layer.block.register_forward_pre_hook(self._on_block, with_kwargs=True))
        handles.append(self.layer.block.register_forward_hook(self._on_output))
        handles.append(self.around.register_forward_hook(self._on_sum))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_module(self, module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG002
        self._last = (next((v for v in args if isinstance(v, Tensor)), None), output)

    def _on_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        before, after = self._last
        if given is not after or before is None or before.shape != given.shape:
            raise ValueError(self._refusal("its block is not called with the output of a norm"))
        self.value = before.detach().reshape(-1, before.shape[-1])

    def _on_output(self, module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG002
        self._added = None if self._is_checked else first_tensor(output)
        self._last = (None, None)

    def _on_sum(self, module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG002
        if self._added is not None:
            if self._added.numel() != self.value.numel():
                raise ValueError(self._refusal("its block gives something of another shape"))
            expected = (self.value + self._added.reshape_as(self.value)).float()
            found = first_tensor(output).float()
            tolerance = 8 * torch.finfo(self.value.dtype).eps * expected.abs().max()
            is_sum = found.numel() == expected.numel() and (found.reshape_as(expected) - expected).abs() <= tolerance
            if not torch.as_tensor(is_sum).all():
                raise ValueError(self._refusal("what its block gives is changed before it is added to the residual"))
        self._is_checked, self._added = True, None

    def _refusal(self, reason: str) -> str:
        return no_residual(self.layer, reason)


def no_residual(layer: MoeLayer, reason: str) -> str:
    """The message for a layer without a residual stream that can be read."""
    return (
        f"The recipe needs the residual stream around {layer.block_name!r}, which cannot be read: {reason}. "
        "Use another saliency, such as 'gated_output_norm', or allocation, such as 'fisher_curve', or leave the layer "
        "out with exclude_layers."
    )


def check_residual(model: nn.Module, layer: MoeLayer) -> nn.Module:
    """The module that adds what a layer's block gives to its residual.

    Raises:
        ValueError: There is none.
    """
    path = layer.block_name.rpartition(".")[0]
    around = model.get_submodule(path)
    if not path or isinstance(around, nn.ModuleList):
        raise ValueError(no_residual(layer, "the block is the whole decoder layer, with an own way to add its parts"))
    return around


def first_tensor(output: Any) -> Tensor:
    """An output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output
