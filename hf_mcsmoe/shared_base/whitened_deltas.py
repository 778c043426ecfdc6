"""The weighted mean of aligned experts, and the low rank of each difference that its inputs feel most."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..expert_values import PackedExperts, SharedBase
from ..observation.gated_features import sum_input_grams
from ..shared_base import SHARED_BASE
from ..shared_budget import base_budget, check_count, check_ridge, check_rows
from ..solvers.barycentre import align_to_barycentre, biases_in_order, mean_of_aligned
from ..solvers.low_rank import decompose, input_metric
from ..types import ExpertWeights

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for a share of rows, a number of iterations or a ridge that cannot be meant."""
    check_rows(options)
    check_count(options, "iterations", 0)
    check_ridge(options)


@SHARED_BASE.register("whitened_deltas", shares="base", check=check_options)
def whitened_deltas(
    weights: ExpertWeights,
    keep: float,
    *,
    importance: Tensor,
    tokens: "LayerTokens",
    iterations: int = 10,
    rows: float = 0.0,
    ridge: float = 0.01,
) -> SharedBase:
    """W_i = B + L_i R_i with the least |(W_i - B - L_i R_i) X_i|_F, X_i what expert i is given; B a weighted mean.

    D2-MoE (Gu et al., 2025, https://arxiv.org/abs/2502.17298). Deviations: here each expert has one weight, the
    recipe's `importance` (by default how often it is used), and no gradient is needed; `fisher_whitened_deltas` weighs
    entry by entry as the paper does. Its code takes the mean of experts whose neurons are in any order; here they are
    aligned first, which can only shrink the differences (`iterations=0` does as it does). Its whitening by a Cholesky
    factor fails where an expert saw fewer tokens than inputs; here the metric comes from eigenvectors and has a ridge,
    which for a rarely used expert leads over to the plain SVD. The base is not pruned any further.

    Memory: 8 N (D^2 + I^2) bytes for the sums of x x^T, in float64; N copies of one matrix in float32.

    Args:
        weights: All N experts.
        keep: Share of their numbers; see `shared_budget.base_budget`.
        importance: (N,), >= 0; all zero weighs all experts the same.
        tokens: What the original experts are given.
        iterations: Of the alignment, at most; 0 leaves neurons where they are.
        rows: Share of what B leaves of the budget that goes to whole rows.
        ridge: Times the mean energy of an input of all experts, added to the energy of each input.

    Returns:
        Bases and factors in the dtype of the weights.

    Raises:
        ValueError: `keep` is too small for a base.
    """
    shares = shares_of(importance)
    order = align_to_barycentre(weights, shares, int(shares.argmax()), iterations)
    parts = mean_of_aligned(weights, order, shares)
    grams = with_ridge(grams_of_experts(weights, tokens), ridge)
    return factors_around(weights, order, parts, grams, keep, rows)


def factors_around(
    weights: ExpertWeights,
    order: Tensor,
    parts: dict[str, tuple[Tensor, Tensor]],
    grams: dict[str, list[Tensor]],
    keep: float,
    rows: float,
) -> SharedBase:
    """The bases, and what each expert keeps of its difference from them in the metric of its own inputs.

    Args:
        weights: All N experts.
        order: Their neurons, (N, I) int64.
        parts: For each matrix (base (O, I), all experts (N, O, I) with neurons in order).
        grams: Of what `up` and `down` of each expert are multiplied with, neurons not in order.
        keep: Share of the numbers of the experts.
        rows: Share of what the base leaves of the budget that goes to whole rows.
    """
    sizes = {name: tuple(base.shape) for name, (base, _) in parts.items()}
    budget = base_budget(sizes, weights.num_experts, keep, rows)
    factors: dict[str, list] = {name: [] for name in parts}
    for expert, places in enumerate(order):
        inward, outward = grams["up"][expert], grams["down"][expert]
        places = places.to(outward.device)
        metric_of_inputs = input_metric(inward)  # of gate and up
        metric_of_neurons = input_metric(outward[places][:, places])  # which are in another order now
        for name, (base, aligned) in parts.items():
            metric = metric_of_neurons if name == "down" else metric_of_inputs
            delta = (aligned[expert].float() - base.float()).to(base.dtype)
            how = {"rank": budget.rank, "num_rows": budget.num_rows[name], "alternations": 8 if rows else 0}
            factors[name].append(decompose(delta, metric.to(delta.device), None, **how))
    return SharedBase({name: base for name, (base, _) in parts.items()}, factors, biases_in_order(weights, order))


def shares_of(importance: Tensor) -> Tensor:
    """`importance` with sum 1, (N,) float64; the same for all where it is all zero."""
    importance, total = importance.double(), importance.double().sum()
    return importance / total if total > 0 else torch.full_like(importance, 1 / len(importance))


def grams_of_experts(weights: ExpertWeights, tokens: "LayerTokens") -> dict[str, list[Tensor]]:
    """For each matrix of each expert the sum over its tokens of x x^T, x what the matrix is multiplied with."""
    dense = ExpertWeights(**{name: tensor.float() for name, tensor in weights.tensors().items()})
    return sum_input_grams(PackedExperts.from_dense(dense), tokens.activation, tokens.calibration)


def with_ridge(grams: dict[str, list[Tensor]], ridge: float) -> dict[str, list[Tensor]]:
    """Each Gram of up and down with `ridge` times the mean energy of an input, over all experts, on its diagonal."""
    found = {}
    for name in ("up", "down"):  # gate reads what up reads
        of_expert = grams[name]
        energy = torch.stack([gram.diagonal().mean() for gram in of_expert]).mean()
        eye = torch.eye(len(of_expert[0]), dtype=of_expert[0].dtype, device=of_expert[0].device)
        found[name] = [gram + ridge * energy * eye for gram in of_expert]
    return found
