"""All experts of a layer read and write a few latent numbers through projections that they share."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..expert_values import SharedProjection
from ..shared_base import SHARED_BASE
from ..shared_budget import check_ridge, latent_size
from ..solvers.low_rank import input_metric
from ..types import ExpertWeights
from .whitened_deltas import grams_of_experts, with_ridge

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens


@SHARED_BASE.register("latent_projection", shares="projection")
def latent_projection(weights: ExpertWeights, keep: float) -> SharedProjection:
    """gate_i = A_i B, up_i = A'_i B, down_i = C A''_i: the best B and C for the matrices of all experts, without data.

    MoLAE (Liu et al., 2025, https://arxiv.org/abs/2503.23100), of which we know an abstract and a summary. B are the
    leading right singular vectors of all gates and ups on top of each other, C the leading left ones of all downs side
    by side, and the latent matrices what is left of the experts in these. Both sets of vectors are whole bases of the
    hidden space in a trained model, so half of the latent numbers loses about half of the matrices.

    Args:
        weights: All N experts.
        keep: Share of their numbers; see `shared_budget.latent_size`.

    Returns:
        Projections and latent matrices in float32, with the biases as they were.

    Raises:
        ValueError: `keep` leaves no latent number.
    """
    size = latent_size(sizes_of(weights), weights.num_experts, keep)
    inner = [getattr(weights, name).double() for name in inward_names(weights)]
    inward = leading_vectors(sum(torch.einsum("noi,noj->ij", matrix, matrix) for matrix in inner), size).T
    outward = leading_vectors(torch.einsum("noi,npi->op", weights.down.double(), weights.down.double()), size)
    latent = {name: t @ inward.T for name, t in zip(inward_names(weights), inner, strict=True)}
    return as_value(weights, inward, outward, latent | {"down": outward.T @ weights.down.double()})


@SHARED_BASE.register("whitened_latent_projection", shares="projection", check=check_ridge)
def whitened_latent_projection(
    weights: ExpertWeights, keep: float, *, tokens: "LayerTokens", ridge: float = 0.01
) -> SharedProjection:
    """The same for the outputs of the matrices on calibration tokens instead of the matrices themselves.

    The variant of MoLAE (https://arxiv.org/abs/2503.23100) that looks at input covariances, then its second stage, a
    fit of each expert's own part. B is the best for the covariance of the inputs of all experts; given B, A_i
    minimises |(W_i - A_i B) X_i|_F for the expert's own inputs. For down, C and A''_i = C^T W_i are the best with each
    expert's own inputs at once.

    Memory: 8 N (D^2 + I^2) bytes for the sums of x x^T, in float64; the matrices in float64.

    Args:
        weights: All N experts.
        keep: Share of their numbers; see `shared_budget.latent_size`.
        tokens: What the original experts are given.
        ridge: Times the mean energy of an input of all experts, added to the energy of each input. Where no token was
            seen at all, the plain `latent_projection`.

    Returns:
        Projections and latent matrices in float32, with the biases as they were.

    Raises:
        ValueError: `keep` leaves no latent number.
    """
    size = latent_size(sizes_of(weights), weights.num_experts, keep)
    grams = grams_of_experts(weights, tokens)
    if not any(gram.any() for gram in grams["up"]):
        return latent_projection(weights, keep)
    grams = with_ridge(grams, ridge)
    names = inward_names(weights)
    inner = {name: getattr(weights, name).double() for name in names}
    metric = input_metric(sum(grams["up"]))
    seen = sum(torch.einsum("noi,noj->ij", matrix, matrix) for matrix in inner.values()).to(metric)
    # Rows of B span what V^T C^-1 spans, V the leading vectors of the matrices in the metric C.
    inward = leading_vectors(metric.T @ seen @ metric, size).T @ metric.T @ seen
    inward = torch.linalg.qr(inward.T).Q.T
    latent = {name: torch.empty(*matrix.shape[:2], len(inward), dtype=matrix.dtype) for name, matrix in inner.items()}
    for expert, gram in enumerate(grams["up"]):
        in_latent = inward @ gram @ inward.T
        for name in names:
            right = inner[name][expert].to(gram) @ gram @ inward.T
            latent[name][expert] = torch.linalg.solve(in_latent, right, left=False)
    down = weights.down.double()
    outputs = sum(matrix.to(gram) @ gram @ matrix.to(gram).T for matrix, gram in zip(down, grams["down"], strict=True))
    outward = leading_vectors(outputs, size)
    return as_value(weights, inward, outward, latent | {"down": outward.T @ down.to(outward)})


def inward_names(weights: ExpertWeights) -> list[str]:
    """The matrices that read hidden states."""
    return ["up"] if weights.gate is None else ["gate", "up"]


def sizes_of(weights: ExpertWeights) -> dict[str, tuple[int, int]]:
    """(O, I) of each matrix of an expert."""
    return {name: tuple(getattr(weights, name).shape[1:]) for name in [*inward_names(weights), "down"]}


def leading_vectors(gram: Tensor, count: int) -> Tensor:
    """The eigenvectors (n, count) of the largest eigenvalues of a symmetric matrix (n, n), largest first."""
    return torch.linalg.eigh(gram).eigenvectors[:, -count:].flip(1)


def as_value(weights: ExpertWeights, inward: Tensor, outward: Tensor, latent: dict[str, Tensor]) -> SharedProjection:
    """In float32, on the device of the weights, with the biases of all experts."""
    device = weights.up.device
    tensors = weights.tensors().items()
    biases = {name.removesuffix("_bias"): t for name, t in tensors if name.endswith("_bias")}
    stacks = {name: stack.to(device, torch.float32) for name, stack in latent.items()}
    return SharedProjection(inward.to(device).float(), outward.to(device).float(), stacks, biases)
