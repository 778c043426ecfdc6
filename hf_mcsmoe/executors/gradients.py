"""A calibration forward with a backward of the language-model loss, for statistics of gradients."""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..calibration import Calibration
from ..families import reading_part
from ..types import MoeLayer

GRAPH_BYTES = 2**31  # of activations that are kept for a backward pass instead of being computed again


def check_gradients(model: PreTrainedModel, layers: Sequence[MoeLayer], names: Sequence[str]) -> None:
    """Refuse what has no gradients to take, before anything runs.

    Args:
        model: On any device.
        layers: Those that are watched.
        names: The statistics of gradients that are wanted.

    Raises:
        ValueError: A statistic needs gradients, and the model has no language-model loss of its own, or the output of
            its experts cannot be told from the rest.
    """
    if not names:
        return
    wanted = f"Calibration is to collect {', '.join(names)} from gradients of the language-model loss"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{wanted}, but {type(model).__name__} is an encoder-decoder, whose loss needs targets that calibration "
            "does not have. Use a recipe without gradients."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{wanted}, but {type(model).__name__} has no language-model head. Load it with AutoModelForCausalLM."
        )
    for layer in layers:
        if layer.family.observes_router:
            raise ValueError(
                f"{wanted}, but the experts of {layer.name!r} are not called with slots and weights, so their output "
                "cannot be followed. Use a recipe without gradients."
            )


def check_in_memory(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose weights are not all on the devices that compute."""
    if any(has_offloaded_params(module) for module in model.modules()):
        raise ValueError(
            "Weights of the model are offloaded, but gradients need all of them in memory. Load the model without "
            "offloading, or use a recipe without gradients."
        )


def batches_with_backward(calibration: Calibration, gradient_tokens: int | None) -> frozenset[int]:
    """Positions of the batches that run backward: evenly spaced ones with about `gradient_tokens` real tokens.

    A gradient asks for much more work than an output, and mean squares of gradients are known from fewer tokens than
    what is fitted. Held-out batches never run backward.

    Args:
        calibration: Its batches for the statistics.
        gradient_tokens: At least 1; None for all of them.
    """
    positions = [place for place, batch in enumerate(calibration.batches) if not batch.held_out]
    if gradient_tokens is None:
        return frozenset(positions)
    number = min(len(positions), max(1, round(gradient_tokens * len(positions) / calibration.num_tokens)))
    return frozenset(positions[(2 * place + 1) * len(positions) // (2 * number)] for place in range(number))


def graph_bytes(model: PreTrainedModel, layers: Sequence[MoeLayer], calibration: Calibration) -> int:
    """About what the graph of one decoder layer takes for the largest batch, rather too much than too little.

    With B rows of S tokens B S (16 D + k (6 I + 3 D)) numbers of the model's dtype, for the layer of `layers` where
    that is most; with eager attention also 4 S for each head and token.
    """
    rows, length = max((tuple(batch.token_mask.shape) for batch in calibration.batches), key=math.prod)
    config = model.config.get_text_config()
    per_token = max(
        16 * layer.hidden_size + layer.top_k * (6 * layer.intermediate_size + 3 * layer.hidden_size)
        for layer in layers
    )
    if config._attn_implementation == "eager":
        per_token += 4 * length * getattr(config, "num_attention_heads", 0)
    return rows * length * per_token * model.dtype.itemsize


@contextmanager
def differentiable(model: PreTrainedModel, bytes_of_layer: int) -> Iterator[None]:
    """Within the context a forward of `model` has a graph from its embeddings on, and no parameter gets a gradient.

    The graphs of as many decoder layers as fit in `GRAPH_BYTES` are kept, those of the last ones. The others are
    checkpointed where transformers can: only their inputs are kept, and each runs once more in the backward. What was
    trainable before is trainable again afterwards.

    Args:
        model: All of it in memory.
        bytes_of_layer: From `graph_bytes`.
    """
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    embeddings = reading_part(model).get_input_embeddings()
    with ExitStack() as stack:
        model.requires_grad_(False)
        for parameter, value in required.items():
            stack.callback(parameter.requires_grad_, value)
        handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))  # noqa: ARG005
        stack.callback(handle.remove)
        decoder = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in decoder[: max(0, len(decoder) - GRAPH_BYTES // bytes_of_layer)]:
            if not drops(layer):
                stack.enter_context(checkpointed(layer))
        yield


def drops(layer: nn.Module) -> bool:
    """Whether a layer drops values by itself in training mode, which checkpointing asks for."""
    rates = [value for name, value in vars(layer).items() if "drop" in name and isinstance(value, int | float)]
    return any(rate > 0 for rate in rates)


@contextmanager
def checkpointed(layer: GradientCheckpointingLayer) -> Iterator[None]:
    """Within the context a layer keeps only its inputs for the backward. Its parts stay in evaluation mode."""
    changes: dict[str, Any] = {
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": functools.partial(checkpoint, use_reentrant=False),
        "training": True,
    }
    before = {name: vars(layer)[name] for name in changes if name in vars(layer)}
    vars(layer).update(changes)
    try:
        yield
    finally:
        for name in changes:
            vars(layer).pop(name)
        vars(layer).update(before)


def next_token_loss(logits: Tensor, ids: Tensor, token_mask: Tensor) -> Tensor:
    """Sum over the real tokens that follow a real token of -log p(token), a scalar in nats.

    A sum, so that gradients do not depend on how rows are batched; padding counts neither as given nor as predicted.

    Args:
        logits: (B, S, V).
        ids: (B, S).
        token_mask: (B, S) bool.
    """
    is_predicted = token_mask[:, :-1] & token_mask[:, 1:]
    targets = ids[:, 1:].masked_fill(~is_predicted, -100).to(logits.device)
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


def loss_of(called: nn.Module, inputs: dict[str, Any], token_mask: Tensor) -> Tensor:
    """The loss of a causal language model on a batch, with its graph. Call it within `differentiable`.

    Args:
        called: The model.
        inputs: Its arguments, `input_ids` among them; the logits of all tokens are computed.
        token_mask: (B, S) bool.
    """
    inputs = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
    ids = inputs["input_ids"]
    return next_token_loss(called(**inputs).logits, ids, token_mask.to(ids.device))
