"""The residual stream after an MoE layer, which a compressed layer can be asked to bring back to what it was."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..families.residual import first_tensor
from ..types import MoeLayer


@contextmanager
def watched_stream(model: nn.Module, layer: MoeLayer, keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context `keep` gets the residual stream after a layer, (T, D), each time the model runs."""

    def on_output(module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG001
        stream = first_tensor(output).detach()
        keep(stream.reshape(-1, stream.shape[-1]))

    handle = decoder_layer(model, layer).register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def decoder_layer(model: nn.Module, layer: MoeLayer) -> nn.Module:
    """The member of a list of modules that is, or holds, the block of a layer.

    Raises:
        ValueError: There is none.
    """
    parts = layer.block_name.split(".")
    for end in range(len(parts), 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return model.get_submodule(".".join(parts[:end]))
    raise ValueError(refusal(layer, "its block is in no list of decoder layers"))


def refusal(layer: MoeLayer, reason: str) -> str:
    """The message for a layer whose stream cannot be brought back."""
    return (
        f"targets is 'original_stream', but the residual stream after {layer.name!r} cannot be followed: {reason}. "
        "Leave targets out, or leave the layer out with exclude_layers."
    )


def check_streams(model: nn.Module, layers: Sequence[MoeLayer]) -> None:
    """Refuse, before anything runs, a model whose residual streams cannot be followed.

    Raises:
        ValueError: An encoder-decoder, experts that are not called with slots and weights, or no decoder layer.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"targets is 'original_stream', but {type(model).__name__} is an encoder-decoder, which has two streams. "
            "Leave targets out."
        )
    for layer in layers:
        if layer.family.observes_router:
            raise ValueError(refusal(layer, "its experts are not called with slots and weights"))
        decoder_layer(model, layer)
