"""How much the loss asks of the outputs of experts: statistics of a backward pass, and what goes with them."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..observation.observed import ExpertTokens, ObservedTokens, sum_dtype
from ..statistics import STATISTICS


@STATISTICS.register("activation_energy", of="expert")
def activation_energy(routed: ExpertTokens) -> Tensor:
    """Sum over the routed tokens of a_i(x_t)^2, neuron by neuron, (N, I). Memory: 8 N I bytes."""
    return routed.activations.square().sum(0)


@STATISTICS.register("gradient_count", of="slots", gradients=True)
def gradient_count(observed: ObservedTokens) -> Tensor:
    """The part of `selection_count` whose gradients were taken, (N,) int64: see `Recipe.gradient_tokens`."""
    return observed.sum_by_slot(torch.ones_like(observed.top_k_index))


@STATISTICS.register("neuron_gradient_energy", of="expert", gradients=True)
def neuron_gradient_energy(routed: ExpertTokens) -> Tensor:
    """Sum over the routed tokens of (gamma_t . down[:, a])^2, (N, I), with gamma_t = d loss / d f_i(x_t).

    That is down[:, a]^T (sum gamma gamma^T) down[:, a]: the (D, D) sums that HEAPr keeps of every expert enter its
    score only so. Memory: 8 N I bytes.
    """
    return (routed.output_gradients @ routed.weights.down[0].float()).square().sum(0)


@STATISTICS.register("output_gradient_energy", of="slots", gradients=True)
def output_gradient_energy(observed: ObservedTokens) -> Tensor:
    """Sum over the tokens of |gamma_t|^2, a scalar, with gamma_t = d loss / d output of the routed experts together.

    The trace of the empirical Fisher information of that output.
    """
    gradients = observed.output_gradients
    energies = gradients.to(sum_dtype(gradients.device)).square().sum(-1)
    return torch.where(observed.token_mask.to(energies.device), energies, 0).sum()


@STATISTICS.register("fisher", of="expert", gradients=True, precision="float32")
def fisher(routed: ExpertTokens) -> Tensor:
    """Diagonal of the empirical Fisher information, (N, parameters of an expert).

    Sum over the routed tokens of the squared gradient of the loss by each weight, token by token: gamma_d^2 a^2 for
    the last matrix, delta_a^2 x_d^2 for the others, with delta the gradient before the activation. Parameters are
    those of `ExpertWeights.tensors()`, flat, one after another. Memory: 4 bytes for each parameter of all experts.
    """
    gamma, up, gate = inner_gradients(routed)
    inputs = routed.hidden_states.square()
    squares = {"up": up.square().T @ inputs, "down": gamma.square().T @ routed.activations.square()}
    biases = {"up_bias": up.square().sum(0), "down_bias": gamma.square().sum(0)}
    if gate is not None:
        squares["gate"], biases["gate_bias"] = gate.square().T @ inputs, gate.square().sum(0)
    found = squares | biases
    return torch.cat([found[name].flatten() for name in routed.weights.tensors()])


def inner_gradients(routed: ExpertTokens) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the loss by what `down` (t, D), `up` (t, I) and `gate` (t, I; or None) give."""
    down, bias = routed.weights.down[0].float(), routed.weights.down_bias
    up, gate = routed.projections
    with torch.enable_grad():
        inner = [tensor.detach().requires_grad_() for tensor in (up, gate) if tensor is not None]
        activations = routed.activation(*inner, *([None] if gate is None else []))
        gamma = routed.output_gradients
        if routed.finish(gamma) is not gamma:  # most modules leave outputs as they are
            before = linear(activations.detach(), down, None if bias is None else bias[0].float()).requires_grad_()
            (gamma,) = torch.autograd.grad(routed.finish(before), before, gamma)
        gradients = torch.autograd.grad(activations, inner, gamma @ down)
    return gamma, gradients[0], gradients[1] if gate is not None else None
