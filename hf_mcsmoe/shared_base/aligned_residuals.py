"""The barycentre of aligned experts, and the best low rank of what each expert differs by."""

from typing import Any

import torch
from torch import Tensor

from ..expert_values import SharedBase
from ..shared_base import SHARED_BASE
from ..shared_budget import base_budget, check_count, check_rows
from ..solvers.barycentre import align_to_barycentre, biases_in_order, mean_of_aligned
from ..solvers.low_rank import decompose
from ..types import ExpertWeights


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for a share of rows or a number of iterations that cannot be meant."""
    check_rows(options)
    check_count(options, "iterations", 0)


@SHARED_BASE.register("aligned_residuals", shares="base", check=check_options)
def aligned_residuals(
    weights: ExpertWeights, keep: float, *, importance: Tensor, iterations: int = 10, rows: float = 0.0
) -> SharedBase:
    """W_i = B + truncated SVD of (P_i W_i - B), B the barycentre of all experts: without any data.

    ResMoE (Ai et al., 2025, https://arxiv.org/abs/2503.06881), of which we know a summary only, with its residual by
    SVD. Its other residual, the entries of largest magnitude wherever they are, is not offered: an index for each
    entry takes as much as the entry in 16 bits, and such products are slower than dense ones. With `rows` > 0 whole
    rows of what the low rank misses are kept instead, which take one index for D or I numbers.

    Args:
        weights: All N experts.
        keep: Share of their numbers; see `shared_budget.base_budget`.
        importance: The alignment starts at the most important expert; all weigh the same in B, as in the paper.
        iterations: Of the alignment, at most; 0 leaves neurons where they are.
        rows: Share of what B leaves of the budget that goes to whole rows.

    Returns:
        Bases and factors in the dtype of the weights.

    Raises:
        ValueError: `keep` is too small for a base.
    """
    num_experts = weights.num_experts
    shares = torch.full((num_experts,), 1 / num_experts)
    order = align_to_barycentre(weights, shares, int(importance.argmax()), iterations)
    parts = mean_of_aligned(weights, order, shares)
    budget = base_budget({name: tuple(base.shape) for name, (base, _) in parts.items()}, num_experts, keep, rows)
    factors = {
        name: [
            decompose(
                (matrix.float() - base.float()).to(base.dtype),
                None,
                None,
                rank=budget.rank,
                num_rows=budget.num_rows[name],
                alternations=0,
            )
            for matrix in aligned
        ]
        for name, (base, aligned) in parts.items()
    }
    return SharedBase({name: base for name, (base, _) in parts.items()}, factors, biases_in_order(weights, order))
