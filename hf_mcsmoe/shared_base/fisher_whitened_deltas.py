"""The mean of aligned experts, each weight by how much the loss depends on it, and low-rank differences from it."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..expert_values import SharedBase
from ..shared_base import SHARED_BASE
from ..solvers.barycentre import align_to_barycentre
from ..solvers.entrywise_mean import entrywise_mean, of_tensors
from ..types import ExpertWeights, LayerStatistics, permute
from .whitened_deltas import check_options, factors_around, grams_of_experts, shares_of, with_ridge

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens


@SHARED_BASE.register("fisher_whitened_deltas", needs=("fisher",), shares="base", check=check_options)
def fisher_whitened_deltas(
    weights: ExpertWeights,
    keep: float,
    *,
    importance: Tensor,
    statistics: LayerStatistics,
    tokens: "LayerTokens",
    iterations: int = 10,
    rows: float = 0.0,
    ridge: float = 0.01,
) -> SharedBase:
    """W_i = B + L_i R_i with the least |(W_i - B - L_i R_i) X_i|_F, B = sum_i F_i * W_i / sum_i F_i entry by entry.

    D2-MoE (Gu et al., 2025, https://arxiv.org/abs/2502.17298), F_i the diagonal Fisher information of expert i: its
    sums over the tokens that were routed to it, so how often it is used is in them. Where no expert has any Fisher
    information the mean weighted by `importance` is taken. Alignment, metric and ridge as in `whitened_deltas`; the
    squares of gradients are taken token by token, not sample by sample.

    Memory: that of `whitened_deltas`, and 4 bytes for each parameter of all experts.

    Args:
        weights: All N experts.
        keep: Share of their numbers; see `shared_budget.base_budget`.
        importance: (N,), >= 0, of the experts in the alignment; all zero weighs all the same.
        statistics: With `fisher`.
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
    information = of_tensors(statistics["fisher"], weights)
    parts = {}
    for name, tensor in weights.tensors().items():
        if not name.endswith("_bias"):
            aligned = permute(name, tensor, order)
            mean = entrywise_mean(aligned.float(), permute(name, information[name], order), shares)
            parts[name] = (mean.to(tensor.dtype), aligned)
    grams = with_ridge(grams_of_experts(weights, tokens), ridge)
    return factors_around(weights, order, parts, grams, keep, rows)
