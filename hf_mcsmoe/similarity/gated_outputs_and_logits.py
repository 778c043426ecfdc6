"""How alike experts are in what they add to the layer and in how the router scores them."""

import torch
from torch import Tensor

from ..similarity import SIMILARITY
from ..types import ExpertWeights, LayerStatistics
from .router_logits import cosines_of_gram


@SIMILARITY.register("gated_outputs_and_logits", needs=("soft_gated_output_sum", "logit_gram"))
def gated_output_and_logit_similarity(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Average of an output similarity and a gate similarity, (N, N) float64 in [0, 1].

    The measure of REAM (https://arxiv.org/abs/2604.04356), after its public code:

        outputs: (cos(o_i, o_j) + 1) / 2, o_i = mean over tokens of p_ti f_i(x_t)
        gates:   1 - D_ij / max D, D_ij = |z_i / |z_i| - z_j / |z_j||, z_i the router logits of expert i over tokens

    p is the softmax over all N logits, whatever the model makes of them for its gates. As in the code the outputs
    are averaged before the cosine. Deviations: the mean output is over the recipe's `every_expert_tokens`; padding
    never counts, and every token counts alike (the code lets padding in and gives every batch the same weight).

    Memory: 8 N D + 8 N^2 bytes.

    Args:
        statistics: Needs `soft_gated_output_sum` and `logit_gram`.
        weights: Not used.

    Returns:
        Symmetric, diagonal 1. If all logit columns point the same way the gates of all experts are alike.
    """
    sums = statistics["soft_gated_output_sum"]
    of_outputs = (cosines_of_gram(sums @ sums.T) + 1) / 2
    return (of_outputs + gate_similarity(statistics["logit_gram"])) / 2


def gate_similarity(gram: Tensor) -> Tensor:
    """1 - D / max D from the Gram matrix of the logits, (N, N); a column of zeros stays zero when it is normalised."""
    is_scored = (gram.diagonal() > 0).double()
    squared = is_scored[:, None] + is_scored - 2 * cosines_of_gram(gram) * torch.outer(is_scored, is_scored)
    distance = squared.clamp_min(0).sqrt().fill_diagonal_(0.0)
    most = distance.max()
    return 1 - distance / torch.where(most > 0, most, 1.0)
