"""How much an expert's outputs vary, and how much it is used: what a constant in its place would lose."""

import torch
from torch import Tensor

from ..saliency import SALIENCY
from ..types import ExpertWeights, LayerStatistics

NEEDS = ("selection_count", "gate_sum", "routed_output_sum", "squared_output_norm_sum")


@SALIENCY.register("output_variance", needs=NEEDS)
def output_variance(statistics: LayerStatistics, weights: ExpertWeights, *, per_selection: bool = False) -> Tensor:
    """|sqrt(Var f_i(x_t))| times the mean gate, (N,) float64; 0 for an expert that was never used.

    The score of MoNE (Zhang et al., 2026, https://arxiv.org/abs/2507.00390), known to us from its code and from
    summaries: the variance is taken over the tokens that were routed to the expert, for each dimension; its square
    roots have the norm sqrt(sum of the variances). The mean gate is that over all tokens, 0 where the expert was not
    chosen, as the code does.

    Args:
        statistics: Of the layer.
        weights: Not used.
        per_selection: Take the mean gate over the routed tokens only, as the text can be read: frequency then does
            not enter.
    """
    count = statistics.selection_count.clamp(min=1)
    mean = statistics["routed_output_sum"] / count[:, None]
    variance = statistics["squared_output_norm_sum"] / count - mean.square().sum(1)
    tokens = count if per_selection else max(1, statistics.num_tokens)
    score = variance.clamp(min=0).sqrt() * statistics["gate_sum"].abs() / tokens
    return torch.where(statistics.selection_count > 0, score, 0.0)
