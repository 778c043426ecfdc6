"""How much experts give to the tokens whose direction the layer turns."""

import torch
from torch import Tensor

from ..observation.observed import ObservedTokens, RunningExperts, sum_dtype
from ..statistics import STATISTICS


@STATISTICS.register("residual_change_sum", of="experts", residual=True)
def residual_change_sum(experts: RunningExperts, observed: ObservedTokens) -> Tensor:
    """Sum over the routed tokens of |g_t f_i(x_t)| max(1 - cos(r_t, r_t + y_t), 0), (N,).

    r_t is the residual stream that the layer reads and y_t = sum over experts of g_t f_i(x_t) what its routed experts
    add to it; what shared experts add is left out. A token whose stream is zero before or after has a cosine of 0.

    Memory: 8 N bytes; D + N numbers for each token of a batch meanwhile.
    """
    residual = observed.residual.float()
    routed_output = torch.zeros_like(residual)
    norms = residual.new_zeros(observed.num_slots, len(residual))
    for routed in experts.where_routed(observed):
        routed_output.index_add_(0, routed.tokens, routed.gates[:, None] * routed.outputs)
        norms[routed.expert, routed.tokens] = routed.gates.abs() * routed.outputs.norm(dim=-1)
    change = 1 - cosine(residual, residual + routed_output)
    is_real = observed.token_mask.to(change.device)
    change = torch.where(is_real, change.clamp(min=0), 0)
    return norms.to(sum_dtype(norms.device)) @ change.to(sum_dtype(norms.device))


def cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine between rows of (T, D), (T,) in the dtype of sums; 0 where one of them is zero."""
    left, right = (rows.to(sum_dtype(rows.device)) for rows in (left, right))
    lengths = left.norm(dim=-1) * right.norm(dim=-1)
    return torch.where(lengths > 0, (left * right).sum(-1) / torch.where(lengths > 0, lengths, 1), 0)
