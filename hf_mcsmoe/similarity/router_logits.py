"""How alike the router scores two experts over the calibration tokens."""

import torch
from torch import Tensor

from ..similarity import SIMILARITY
from ..types import ExpertWeights, LayerStatistics


@SIMILARITY.register("router_logits", needs=("logit_gram",))
def router_logit_similarity(
    statistics: LayerStatistics,
    weights: ExpertWeights,
    *,
    center: bool = False,
) -> Tensor:
    """Cosine between the router-logit columns of two experts, (N, N) float64 in [-1, 1].

    The similarity of M-SMoE (Li et al., 2024, section 3.2, https://arxiv.org/abs/2310.01334), from the Gram
    matrix of the logits, so no logits are stored: O(N^2) memory for any number of tokens.

    Args:
        statistics: Needs `logit_gram`.
        weights: Not used.
        center: Subtract each token's mean logit first, which makes the measure blind to the shift that the
            softmax ignores. Not in the paper.

    Returns:
        Symmetric, diagonal 1. An expert whose logits are all zero is similar to no other: its row is 0.
    """
    gram = statistics["logit_gram"]
    if center:
        gram = gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()
    return cosines_of_gram(gram)


def cosines_of_gram(gram: Tensor) -> Tensor:
    """Cosines of vectors from their inner products, (N, N) in [-1, 1]; a zero vector is like itself alone."""
    norm = gram.diagonal().clamp_min(0).sqrt()
    outer = torch.outer(norm, norm)
    similarity = torch.where(outer > 0, gram / torch.where(outer > 0, outer, 1.0), 0.0).clamp(-1, 1)
    return similarity.fill_diagonal_(1.0)
