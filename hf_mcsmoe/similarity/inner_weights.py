"""How alike the matrices are that two experts apply to their input."""

import torch
from torch import Tensor

from ..observation.observed import sum_dtype
from ..similarity import SIMILARITY
from ..types import ExpertWeights, LayerStatistics
from .router_logits import cosines_of_gram

MOST_NUMBERS = 2**24


@SIMILARITY.register("inner_weights")
def inner_weight_similarity(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Cosine between the flattened [up; gate] of two experts, (N, N) float64 in [-1, 1].

    The measure of MergeMoE (2025, https://arxiv.org/abs/2510.14436), which the paper takes of the weights as they
    are: it depends on the order of the neurons. Biases do not count.

    Memory: `MOST_NUMBERS` float32 numbers at a time (N D where that is more), and 8 N^2 bytes. Time: N^2 I D.

    Args:
        statistics: Not used.
        weights: All N experts.
    """
    matrices = [matrix for matrix in (weights.up, weights.gate) if matrix is not None]
    num_experts, width, hidden = weights.up.shape
    gram = torch.zeros(num_experts, num_experts, dtype=sum_dtype(weights.up.device), device=weights.up.device)
    for neurons in torch.arange(width).split(max(1, MOST_NUMBERS // (num_experts * hidden))):
        for matrix in matrices:
            rows = matrix[:, neurons[0] : neurons[-1] + 1].flatten(1).float()
            gram += rows @ rows.T
    return cosines_of_gram(gram.cpu().double())
