"""How large the residual stream is once the routed experts of a layer have added their output."""

import torch
from torch import Tensor

from ..observation.observed import ObservedTokens, RunningExperts, sum_dtype
from ..statistics import STATISTICS


@STATISTICS.register("stream_energy", of="experts", residual=True)
def stream_energy(experts: RunningExperts, observed: ObservedTokens) -> Tensor:
    """Sum over the tokens of |r_t + y_t|^2, a scalar.

    r_t is the residual stream that the layer reads and y_t = sum over experts of g_t f_i(x_t) what its routed experts
    add to it; what shared experts add is left out. D numbers for each token of a batch meanwhile.
    """
    stream = observed.residual.float().clone()
    for routed in experts.where_routed(observed):
        stream.index_add_(0, routed.tokens, routed.gates[:, None] * routed.outputs)
    energies = stream.to(sum_dtype(stream.device)).square().sum(-1)
    return torch.where(observed.token_mask.to(energies.device), energies, 0).sum()
