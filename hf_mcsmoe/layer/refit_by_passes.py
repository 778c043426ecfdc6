"""The least-squares refit of layers whose joint Gram matrix is too large: conjugate gradients over the tokens."""

import dataclasses
import itertools

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..observation.gated_features import (
    Activation,
    RoutedTokens,
    apply_down,
    chunks,
    features_of_experts,
    output_of_biases,
    sum_expert_grams,
)

RIDGE = 1e-2
MAX_ITERATIONS = 30
TOLERANCE = 1e-3  # of the residual, relative to the first


@torch.no_grad()
def refit_by_passes(
    experts: PackedExperts, activation: Activation, tokens: list[RoutedTokens], ridge: float = RIDGE
) -> Tensor:
    """The `down` of `refit_by_least_squares` for one ridge, without the products of neurons of different experts.

    Conjugate gradients on the normal equations (Phi^T Phi + ridge) X = Phi^T (y - Phi down0), all D columns at once,
    preconditioned by the block of each expert, which is factorized exactly; the solution is down0 + X. Every
    iteration is one pass over the tokens that computes their features anew.

    Args:
        experts: M experts with P neurons; `down` is down0.
        activation: From `MoeFamily.activation`.
        tokens: What the experts see, and what the layer should give.
        ridge: Relative to the mean energy of each expert's features.

    Returns:
        (P, D) float64. Memory: 16 times the sum of the squared widths, and 40 P D bytes. It stops when the residual
        fell to `TOLERANCE`, or after `MAX_ITERATIONS`.
    """
    grams = sum_expert_grams(experts, activation, tokens)
    energy = torch.stack([gram.diagonal().sum() / max(1, len(gram)) for gram in grams])
    if not energy.any():
        return experts.down.double()  # no neuron ever answers
    energy = torch.where(energy > 0, energy, energy.mean())
    offsets = experts.offsets.tolist()
    damping = torch.cat([e.expand(width) for e, width in zip(ridge * energy, experts.widths.tolist(), strict=True)])
    factors = []
    for gram, e in zip(grams, ridge * energy, strict=True):
        factors.append(torch.linalg.cholesky(gram + e * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))

    def precondition(residual: Tensor) -> Tensor:
        parts = [
            torch.cholesky_solve(residual[a:b], f)
            for (a, b), f in zip(itertools.pairwise(offsets), factors, strict=True)
        ]
        return torch.cat(parts)

    down = experts.down.double()
    residual = pull_back(experts, activation, tokens)  # Phi^T (y - Phi down0)
    solution, first = torch.zeros_like(down), residual.square().sum()
    preconditioned = precondition(residual)
    direction, rho = preconditioned, (residual * preconditioned).sum(0)
    for _ in range(MAX_ITERATIONS):
        if residual.square().sum() <= TOLERANCE**2 * first:
            break
        image = damping[:, None] * direction + normal_product(experts, activation, tokens, direction)
        step = safe_ratio(rho, (direction * image).sum(0))
        solution += step * direction
        residual = residual - step * image
        preconditioned = precondition(residual)
        rho, previous = (residual * preconditioned).sum(0), rho
        direction = preconditioned + safe_ratio(rho, previous) * direction
    return down + solution


def safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their quotient, 0 where a column is solved already."""
    return torch.where(denominator > 0, numerator / denominator, 0)


def pull_back(experts: PackedExperts, activation: Activation, tokens: list[RoutedTokens]) -> Tensor:
    """Sum of phi (y - phi down)^T, (P, D) float64."""
    total = torch.zeros_like(experts.down, dtype=torch.float64)
    for batch in tokens:
        for part in chunks(len(batch.gates)):
            piece = RoutedTokens(batch.hidden_states[part], batch.gates[part], batch.targets[part])
            error = piece.targets.float() - apply_down(experts, activation, piece)
            add_features(experts, activation, piece, error, total)
    return total


def normal_product(
    experts: PackedExperts, activation: Activation, tokens: list[RoutedTokens], vectors: Tensor
) -> Tensor:
    """Sum of phi (phi vectors)^T for vectors (P, D), (P, D) float64."""
    total = torch.zeros_like(vectors)
    moved = dataclasses.replace(experts, down=vectors.float())
    for batch in tokens:
        for part in chunks(len(batch.gates)):
            piece = RoutedTokens(batch.hidden_states[part], batch.gates[part], batch.targets[part])
            output = apply_down(moved, activation, piece)
            constant = output_of_biases(experts, piece.gates)
            add_features(experts, activation, piece, output if constant is None else output - constant, total)
    return total


def add_features(
    experts: PackedExperts, activation: Activation, piece: RoutedTokens, values: Tensor, total: Tensor
) -> None:
    """Add the sum of phi values^T of some tokens to `total`."""
    found = features_of_experts(experts, activation, piece.hidden_states, piece.gates)
    for (start, end), (index, features) in zip(itertools.pairwise(experts.offsets.tolist()), found, strict=True):
        total[start:end] += (features.T @ values[index]).double()
