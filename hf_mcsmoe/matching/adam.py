"""A few hundred steps of Adam on all matrices of a layer's experts, and its router."""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..expert_values import PackedExperts
from ..matching import MATCHING
from ..observation.gated_features import Activation, apply_down
from .tokens import MatchingTokens, held_out_error

NUM_CHECKS = 5  # of the held-out error, spread evenly over the steps
BETAS = (0.9, 0.98)  # short runs: a memory of 50 steps for the squares


@MATCHING.register("adam")
def match_by_adam(
    experts: PackedExperts,
    activation: Activation,
    tokens: MatchingTokens,
    held_out: MatchingTokens,
    *,
    seed: int,
    steps: int = 200,
    tokens_per_step: int = 2048,
    learning_rate: float = 0.16,
    router: bool = False,
) -> PackedExperts:
    """Minimise |y - layer(x)|^2 over the tokens, relative to the mean |y|^2.

    Layer-wise distillation on the layer alone: gradients never leave it, so it needs the memory of one layer. The
    learning rate of a matrix is `learning_rate` times the root mean square of its entries times the root of the
    relative error of held-out tokens at the start (at most 1), because weights have about as far to go as outputs. It
    falls linearly to 0. The state with the least held-out error is kept, the first one included, so the result is
    never worse there.

    Args:
        experts: M experts, float32. They are not changed.
        activation: From `MoeFamily.activation`.
        tokens: What is trained on; its router is trained too, in place, where it has one.
        held_out: What states are compared on.
        seed: Draws the tokens of each step.
        steps: Optimiser steps.
        tokens_per_step: Tokens of each step, drawn without replacement until all were seen.
        learning_rate: Relative to the size of each matrix and to the error that there is to make up for, > 0.
        router: Train the router's matrices as well. That did not help where it was tried: the choices of the original
            router are what the experts are made for.

    Returns:
        Experts of the same widths. Memory: 4 times the experts, and the activations of `tokens_per_step` tokens.
    """
    trained = {name: nn.Parameter(t.clone()) for name, t in experts.tensors().items()}
    parameters = [*trained.values(), *(tokens.router_parameters() if router else [])]
    best, least = snapshot(parameters), held_out_error(experts, activation, held_out)
    if least == 0:
        return experts
    rate = learning_rate * (math.sqrt(min(1.0, least / held_out.energy)) if held_out.energy > 0 else 1.0)
    groups = [{"params": [p], "lr": rate * p.detach().square().mean().sqrt().item()} for p in parameters]
    optimizer = torch.optim.Adam([group for group in groups if group["lr"] > 0], betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    scale = tokens.energy / len(tokens)
    for step, index in enumerate(draw(len(tokens), tokens_per_step, steps, seed)):
        batch = tokens.batch(index)
        output = apply_down(dataclasses.replace(experts, **trained), activation, batch)
        loss = (output - batch.targets).square().sum() / len(index) / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) * NUM_CHECKS // steps > step * NUM_CHECKS // steps:
            state = {name: p.detach() for name, p in trained.items()}
            error = held_out_error(dataclasses.replace(experts, **state), activation, held_out)
            if error < least:
                best, least = snapshot(parameters), error
    for parameter, value in zip(parameters, best, strict=True):
        parameter.data.copy_(value)
    return dataclasses.replace(experts, **{name: p.detach() for name, p in trained.items()})


def draw(num_tokens: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """For each step the tokens that it sees, (size,) int64: random orders of all, one after another."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, num_tokens)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(num_tokens, generator=generator)
        yield order[:size]
        order = order[size:]


def snapshot(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the values of parameters."""
    return [parameter.detach().clone() for parameter in parameters]
