"""How alike the outputs of two experts are on the same tokens."""

import torch
from torch import Tensor

from ..similarity import SIMILARITY
from ..types import ExpertWeights, LayerStatistics


@SIMILARITY.register("mean_output_distance", needs=("every_expert_count", "every_output_sum"))
def mean_output_similarity(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Minus the Euclidean distance between the mean outputs of two experts, (N, N) float64, <= 0.

    The measure of HC-SMoE (Chen et al., 2024, https://arxiv.org/abs/2410.08589): o_i = mean over tokens of f_i(x_t),
    without gates and for every expert on every token. Deviation: the mean is over the recipe's
    `every_expert_tokens`, drawn from all calibration tokens, not over all of them. A mean hides what depends on the
    token, and where means are short their lengths decide.

    Memory: 8 N D bytes in `statistics`, N^2 D numbers here.

    Args:
        statistics: Needs `every_output_sum` and `every_expert_count`.
        weights: Not used.

    Returns:
        Symmetric, diagonal 0.
    """
    means = statistics["every_output_sum"] / statistics["every_expert_count"]
    return -torch.stack([(means - mean).norm(dim=1) for mean in means])


@SIMILARITY.register("output_cosine", needs=("every_expert_count", "output_cosine_sum"))
def output_cosine(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Mean over tokens of the cosine between the outputs of two experts, (N, N) float64 in [-1, 1].

    The measure of Sub-MoE (Li et al., 2025, https://arxiv.org/abs/2506.23266): token by token, every expert on every
    token. Deviation: over the recipe's `every_expert_tokens`, drawn from all calibration tokens.

    Memory: 8 N^2 bytes.

    Args:
        statistics: Needs `output_cosine_sum` and `every_expert_count`.
        weights: Not used.

    Returns:
        Symmetric, diagonal 1. Tokens for which an expert gives exactly zero count as cosine 0.
    """
    mean = statistics["output_cosine_sum"] / statistics["every_expert_count"]
    return ((mean + mean.T) / 2).clamp(-1, 1).fill_diagonal_(1.0)
