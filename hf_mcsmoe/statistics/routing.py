"""What the router did."""

import torch
from torch import Tensor

from ..observation.observed import ObservedTokens, sum_dtype
from ..statistics import STATISTICS


@STATISTICS.register("selection_count", of="slots")
def selection_count(observed: ObservedTokens) -> Tensor:
    """Tokens that the router sent to each slot with a weight other than 0, (N,) int64."""
    return observed.sum_by_slot(torch.ones_like(observed.top_k_index))


@STATISTICS.register("gate_sum", of="slots")
def gate_sum(observed: ObservedTokens) -> Tensor:
    """Sum of the weights given to each slot, (N,)."""
    return observed.sum_by_slot(observed.top_k_weights.to(sum_dtype(observed.top_k_weights.device)))


@STATISTICS.register("logit_gram", of="slots", logits=True)
def logit_gram(observed: ObservedTokens) -> Tensor:
    """Sum over tokens of the outer product of the router logits, (N, N)."""
    kept = torch.where(observed.token_mask.to(observed.logits.device)[:, None], observed.logits.float(), 0)
    return kept.T @ kept
