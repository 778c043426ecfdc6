"""The router's first choice of each token."""

import torch
from torch import Tensor

from ..observation.observed import ObservedTokens, sum_dtype
from ..statistics import STATISTICS

LEAST_LOGIT = -1.0  # first choices of a lower logit do not count


@STATISTICS.register("top_logit_sum", of="slots", logits=True)
def top_logit_sum(observed: ObservedTokens) -> Tensor:
    """Sum over tokens of the router's largest logit, for the slot that has it, (N,). Memory: 8 N bytes.

    Ties go to the lower slot.
    """
    logits = observed.logits.to(sum_dtype(observed.logits.device))
    largest, slot = logits.max(dim=-1)
    counts = observed.token_mask.to(logits.device) & (largest > LEAST_LOGIT)
    return logits.new_zeros(observed.num_slots).index_add_(0, slot, torch.where(counts, largest, 0))
