"""The least-squares refit of layers whose joint Gram matrix is too large: conjugate gradients over the tokens."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..observation.beside_experts import BesideExperts, joint_down, joint_offsets, with_joint_down
from ..observation.gated_features import (
    Activation,
    apply_down,
    features_of_experts,
    output_of_biases,
    sum_expert_grams,
)
from ..observation.observed import sum_dtype
from ..observation.token_batches import RoutedTokens, chunks

RIDGE = 1e-2
MAX_ITERATIONS = 30
TOLERANCE = 1e-3  # of the residual, relative to the first

Layer = tuple[PackedExperts, Activation, BesideExperts | None]


@torch.no_grad()
def refit_by_passes(
    experts: PackedExperts,
    activation: Activation,
    tokens: list[RoutedTokens],
    ridge: float = RIDGE,
    beside: BesideExperts | None = None,
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
        beside: More blocks of features, P' in all, each with a mean energy of its own.

    Returns:
        (P + P', D) float64. Memory: 16 times the sum of the squared widths, and 40 (P + P') D bytes. It stops when the
        residual fell to `TOLERANCE`, or after `MAX_ITERATIONS`.
    """
    of_layer = experts, activation, beside
    grams = sum_expert_grams(experts, activation, tokens) + grams_beside(beside, tokens)
    energy = torch.stack([gram.diagonal().sum() / max(1, len(gram)) for gram in grams])
    down = joint_down(experts, beside).double()
    if not energy.any():
        return down  # no neuron ever answers
    energy = torch.where(energy > 0, energy, energy.mean())
    offsets = joint_offsets(experts, beside)
    damping = torch.cat([e.expand(len(gram)) for e, gram in zip(ridge * energy, grams, strict=True)])
    factors = []
    for gram, e in zip(grams, ridge * energy, strict=True):
        factors.append(torch.linalg.cholesky(gram + e * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))

    def precondition(residual: Tensor) -> Tensor:
        parts = [
            torch.cholesky_solve(residual[a:b], f)
            for (a, b), f in zip(itertools.pairwise(offsets), factors, strict=True)
        ]
        return torch.cat(parts)

    residual = pull_back(of_layer, tokens)  # Phi^T (y - Phi down0)
    solution, first = torch.zeros_like(down), residual.square().sum()
    preconditioned = precondition(residual)
    direction, rho = preconditioned, (residual * preconditioned).sum(0)
    for _ in range(MAX_ITERATIONS):
        if residual.square().sum() <= TOLERANCE**2 * first:
            break
        image = damping[:, None] * direction + normal_product(of_layer, tokens, direction)
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


def grams_beside(beside: BesideExperts | None, tokens: list[RoutedTokens]) -> list[Tensor]:
    """For each block beside the experts the sum of phi phi^T, (width, width) float64."""
    if beside is None:
        return []
    device = beside.change.device
    grams = [torch.zeros(w, w, dtype=sum_dtype(device), device=device) for w in beside.widths if w]
    for piece in pieces(tokens):
        for gram, (_, features) in zip(grams, beside.features(piece), strict=True):
            gram += (features.T @ features).to(gram.dtype)
    return grams


def pull_back(of_layer: Layer, tokens: list[RoutedTokens]) -> Tensor:
    """Sum of phi (y - phi down)^T, (P + P', D) float64."""
    experts, activation, beside = of_layer
    total = torch.zeros_like(joint_down(experts, beside), dtype=torch.float64)
    for piece in pieces(tokens):
        error = piece.targets.float() - apply_down(experts, activation, piece)
        add_features(of_layer, piece, error if beside is None else error - beside.output(piece), total)
    return total


def normal_product(of_layer: Layer, tokens: list[RoutedTokens], vectors: Tensor) -> Tensor:
    """Sum of phi (phi vectors)^T for vectors (P + P', D), the same shape in float64."""
    experts, activation, beside = of_layer
    total = torch.zeros_like(vectors)
    moved, moved_beside = with_joint_down(experts, beside, vectors.float())
    for piece in pieces(tokens):
        output = apply_down(moved, activation, piece)
        constant = output_of_biases(experts, piece.gates)
        output = output if constant is None else output - constant
        add_features(of_layer, piece, output if beside is None else output + moved_beside.output(piece), total)
    return total


def pieces(tokens: list[RoutedTokens]) -> Iterator[RoutedTokens]:
    """The tokens in as many as are handled at a time."""
    return (batch.part(part) for batch in tokens for part in chunks(len(batch.gates)))


def add_features(of_layer: Layer, piece: RoutedTokens, values: Tensor, total: Tensor) -> None:
    """Add the sum of phi values^T of some tokens to `total`."""
    experts, activation, beside = of_layer
    found = features_of_experts(experts, activation, piece.hidden_states, piece.gates)
    found = found if beside is None else found + beside.features(piece)
    for (start, end), (index, features) in zip(itertools.pairwise(joint_offsets(experts, beside)), found, strict=True):
        total[start:end] += (features.T @ values[index]).double()
