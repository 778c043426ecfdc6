"""Least squares for the down projection of one merged expert on the kept tokens of its layer."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..observation.expert_activations import CHECK_TOKENS, activations, sums_over_tokens
from ..option_checks import check_all, check_real
from ..types import ExpertWeights

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens

# Relative to the largest eigenvalue and for each neuron: what products in float32 cannot tell from 0.
PRECISION = 2.0**-23

RIDGE = 1e-2
CHECK_FIT = check_all(check_real("ridge", 0, 1_000_000, "0 is the pseudo-inverse."), CHECK_TOKENS)


def shares_of(importance: Tensor, device: torch.device) -> Tensor:
    """Importance (m,) that adds up to 1, float32; all of it for the dominant expert, the first, where it is all 0."""
    total = importance.sum()
    shares = importance / total if total > 0 else torch.eye(len(importance), dtype=importance.dtype)[0]
    return shares.to(device, torch.float32)


def weighted_mean(members: ExpertWeights, importance: Tensor) -> ExpertWeights:
    """One expert with the mean of each matrix and bias of the members (m, ...), weighted by importance."""
    shares = shares_of(importance, members.up.device)
    means = {name: torch.tensordot(shares, t, dims=1)[None] for name, t in members.tensors().items()}
    return ExpertWeights(**means)


def fit_down(
    mean: ExpertWeights,
    members: ExpertWeights,
    importance: Tensor,
    tokens: "LayerTokens",
    ridge: float,
    max_tokens: int,
    features: Callable[[Tensor, list[Tensor]], Tensor],
) -> ExpertWeights:
    """The expert `mean` with the `down` that comes closest to the members' weighted mean output.

    Minimises the sum over the kept tokens of |down p_t - sum_i share_i down_i q_ti|^2 + r |down - mean.down|^2, where
    p are features of the merged expert, q_i the activations of member i and r = `ridge` times the mean energy of a
    feature. With `ridge` 0: the solution of least norm, by the pseudo-inverse.

    Memory: 8 I^2 + 8 I D bytes for the sums, (m + 1) t I numbers for t tokens at a time. Time: the activations of all
    members on the T tokens that count, T I^2 + T I D, O(I^3).

    Args:
        mean: What `weighted_mean` gives; its biases stay, they are the exact mean.
        members: m experts, float32.
        importance: (m,).
        tokens: The kept tokens; without any, `mean` is the result. Neither the gates nor who was routed counts.
        ridge: >= 0.
        max_tokens: How many of the tokens count, at even distances.
        features: (hidden states (t, D), activations of each member (t, I)) -> (t, I).
    """
    shares = shares_of(importance, members.up.device).tolist()
    start = mean.down[0] if ridge > 0 else torch.zeros_like(mean.down[0])

    def products(hidden_states: Tensor) -> tuple[Tensor, ...]:
        of_members = [activations(members, member, hidden_states, tokens) for member in range(len(shares))]
        wanted = sum(s * a @ down.T for s, a, down in zip(shares, of_members, members.down, strict=True))
        found = features(hidden_states, of_members)
        return found.T @ found, found.T @ wanted

    num_tokens, sums = sums_over_tokens(tokens, members.up.device, max_tokens, products)
    if num_tokens == 0:
        return mean
    gram, cross = sums
    start = start.T.to(gram.dtype)
    down = start + solve(gram, cross - gram @ start, ridge)
    return ExpertWeights(**{**mean.tensors(), "down": down.T.to(mean.down.dtype)[None]})


def solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(gram + r I)^-1 cross with r = `ridge` times the mean of the diagonal; the pseudo-inverse where `ridge` is 0.

    Args:
        gram: (I, I), positive semi-definite.
        cross: (I, D).
        ridge: >= 0.

    Returns:
        (I, D); 0 where `gram` is 0, because there is nothing to learn.
    """
    energy = gram.diagonal().mean()
    if ridge > 0:
        factor, is_singular = torch.linalg.cholesky_ex(gram + torch.diag((ridge * energy).expand(len(gram))))
        if not is_singular:
            return torch.cholesky_solve(cross, factor)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0) + ridge * energy
    least = values[-1] * len(gram) * PRECISION if ridge == 0 else 0
    inverse = torch.where(values > least, 1 / values, 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ cross))
