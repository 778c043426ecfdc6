"""What the last matrix of a shared expert is multiplied with, and whether the layer adds what it gives."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..families.residual import first_tensor
from ..modeling.offload import execution_device
from ..types import MoeLayer, SharedExpert
from .layer_inputs import LayerInputs

ROUNDINGS = 8  # of the dtype, relative to the largest number of a token, that a sum of two outputs may be off
LEAST_SEEN = 10  # times what a sum is off, in all: the shared expert's part of it, or its absence would not be seen


@torch.no_grad()
def shared_features(shared: SharedExpert, hidden_states: Tensor) -> Tensor:
    """The input of the last matrix of a shared expert, times its gate: (t, its width) float32.

    So the expert gives `shared_features @ down.weight.T`, and the gate times the bias if there is one. It runs as it
    is, in its own dtype and wherever its weights are kept.

    Args:
        shared: The expert.
        hidden_states: (t, D).
    """
    given = hidden_states.to(execution_device(shared.down), shared.down.weight.dtype)
    caught: list[Tensor] = []
    handle = shared.down.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        with evaluating(shared.module):
            shared.module(given)
    finally:
        handle.remove()
    return caught[0].reshape(len(given), -1).float() * gate_of(shared, given)


def gate_of(shared: SharedExpert, hidden_states: Tensor) -> Tensor | float:
    """The weight of a shared expert for each token, (t, 1) float32, or 1."""
    return 1.0 if shared.gate is None else shared.gate(hidden_states).float().sigmoid()


@torch.no_grad()
def routed_scale(layer: MoeLayer, inputs: LayerInputs) -> float | None:
    """What the routed output is multiplied with before that of the shared expert is added; mostly 1.

    The block runs on the tokens of one batch. It must give, up to a factor, the sum of what its routed experts and its
    gated shared expert give for the same hidden states; and the shared expert must give what its last matrix gives.
    Some blocks scale the routed output by their `routed_scaling_factor` (Laguna, MiniMax M3, Step 3.7).

    Args:
        layer: As found, with a shared expert.
        inputs: What it was given.

    Returns:
        None where it is not such a sum, or there are no tokens to tell by. The sum is not looked at where the shared
        expert is beside the block, because what holds the block cannot run alone.
    """
    shared, block = layer.shared, layer.block
    if inputs.is_empty:
        return None
    hidden_states = inputs.experts_inputs[0][0].to(execution_device(shared.down))
    if not shared.in_block:
        with watched(layer) as seen:
            shared.module(hidden_states)
        return 1.0 if torch.equal(seen["shared"], seen["down"]) else None
    calls = ((hidden_states[None], *beside_hidden_states(inputs, hidden_states.device)), (hidden_states[None],))
    arguments = next((call for call in calls if accepts(block, call)), None)
    if arguments is None:
        return None
    with watched(layer) as seen, evaluating(block):
        output = first_tensor(block(*arguments))
    if not torch.equal(seen["shared"], seen["down"]) or not torch.equal(seen["given routed"], seen["given shared"]):
        return None
    parts = seen["routed"].float(), gate_of(shared, seen["given shared"]) * seen["shared"].float()
    scales = dict.fromkeys((1.0, float(getattr(block, "routed_scaling_factor", 1.0))))
    precision = torch.finfo(seen["shared"].dtype).eps
    return next((s for s in scales if is_sum(flat(output).float(), s * parts[0], parts[1], precision)), None)


@contextmanager
def watched(layer: MoeLayer) -> Iterator[dict[str, Tensor]]:
    """Within the context what routed experts, shared expert and its last matrix are given and give, (t, ...)."""
    seen: dict[str, Tensor] = {}

    def on_experts(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
        seen["given routed"] = flat(layer.family.routed_inputs(args, kwargs)[0])
        seen["routed"] = flat(first_tensor(output))

    def on_shared(module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG001
        seen["given shared"], seen["shared"] = flat(args[0]), flat(output)

    def on_down(module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG001
        seen["down"] = flat(output)

    handles = [
        layer.experts.register_forward_hook(on_experts, with_kwargs=True),
        layer.shared.module.register_forward_hook(on_shared),
        layer.shared.down.register_forward_hook(on_down),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the context a module is in evaluation mode: no dropout, no noise."""
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, was_training in training.items():
            child.training = was_training


def flat(tensor: Tensor) -> Tensor:
    """(..., n) -> (t, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def beside_hidden_states(inputs: LayerInputs, device: torch.device) -> list[Tensor]:
    """What else of each token the router of the first batch was given: token ids, for routers that look them up."""
    return [value.to(device) for value in inputs.router_calls[0][0][1:] if isinstance(value, Tensor)]


def accepts(module: nn.Module, arguments: tuple) -> bool:
    """Whether a module can be called with these arguments and no others."""
    try:
        inspect.signature(type(module).forward).bind(module, *arguments)
    except TypeError:
        return False
    return True


def is_sum(output: Tensor, routed: Tensor, shared: Tensor, precision: float) -> bool:
    """Whether `output` (t, D) is `routed` plus `shared`, times one number, up to rounding, so that one can tell."""
    expected = routed + shared
    factor = (output * expected).sum() / expected.square().sum()
    difference = output - factor * expected
    largest = torch.stack([output, factor * routed, factor * shared]).abs().amax((0, 2))
    is_close = difference.abs().amax(1) <= ROUNDINGS * precision * largest
    is_seen = LEAST_SEEN * difference.norm() < (factor * shared).norm()
    return bool(factor > 0) and bool(is_close.all()) and bool(is_seen)
