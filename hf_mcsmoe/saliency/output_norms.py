"""How large the outputs of experts are where the router uses them."""

import torch
from torch import Tensor

from ..saliency import SALIENCY
from ..types import ExpertWeights, LayerStatistics


@SALIENCY.register("gated_output_norm", needs=("selection_count", "gated_output_norm_sum"))
def gated_output_norm(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Mean over an expert's routed tokens of |g_t f_i(x_t)|, (N,) float64; 0 for an expert that was never used.

    The saliency of REAP (Lasby et al., 2025, https://arxiv.org/abs/2510.13999): a conditional mean, so that frequency
    does not enter. g is the gate as the model applies it, normalised over the top k where the model does so; the
    public code did not until 2026-03-11.
    """
    return mean_over_routed(statistics, "gated_output_norm_sum")


@SALIENCY.register("output_norm", needs=("selection_count", "output_norm_sum"))
def output_norm(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Mean over an expert's routed tokens of |f_i(x_t)|, (N,) float64; 0 for an expert that was never used.

    MAN of "task-agnostic expert pruning" (https://arxiv.org/abs/2606.15716), the same as "EAN mean" of REAP's code.
    """
    return mean_over_routed(statistics, "output_norm_sum")


def mean_over_routed(statistics: LayerStatistics, name: str) -> Tensor:
    """A sum over routed tokens by their number, (N,) float64; 0 where there is none."""
    count = statistics.selection_count
    return torch.where(count > 0, statistics[name] / count.clamp(min=1), 0.0)
