"""Means of what an expert gives on the tokens that were routed to it."""

import torch
from torch import Tensor

from ..constants import CONSTANTS
from ..types import LayerStatistics


@CONSTANTS.register("routed_mean", needs=("selection_count", "routed_output_sum"))
def routed_mean(statistics: LayerStatistics) -> Tensor:
    """Mean over an expert's routed tokens of f_i(x_t), (N, D) float64; zeros for an expert that was never used.

    The novice of MoNE (Zhang et al., 2026, https://arxiv.org/abs/2507.00390).
    """
    return quotient(statistics["routed_output_sum"], statistics.selection_count.double())


@CONSTANTS.register("gate_weighted_mean", needs=("squared_gate_sum", "squared_gate_output_sum"))
def gate_weighted_mean(statistics: LayerStatistics) -> Tensor:
    """Mean of f_i(x_t), weighted by g_t^2, over the routed tokens: (N, D) float64; zeros where all gates are 0.

    Of all constants c it has the least squared error of what the slot adds, sum |g_t f_i(x_t) - g_t c|^2. Ours, not
    MoNE's.
    """
    return quotient(statistics["squared_gate_output_sum"], statistics["squared_gate_sum"])


def quotient(sums: Tensor, totals: Tensor) -> Tensor:
    """Rows of (N, D) by totals (N,); zeros where a total is 0."""
    is_known = totals > 0
    return torch.where(is_known[:, None], sums / torch.where(is_known, totals, 1.0)[:, None], 0.0)
