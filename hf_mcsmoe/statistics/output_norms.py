"""How large the outputs of experts are on the tokens that were routed to them."""

from torch import Tensor

from ..observation.observed import ExpertTokens
from ..statistics import STATISTICS


@STATISTICS.register("output_norm_sum", of="expert")
def output_norm_sum(routed: ExpertTokens) -> Tensor:
    """Sum over the routed tokens of |f_i(x_t)|, (N,)."""
    return routed.outputs.norm(dim=-1).sum()


@STATISTICS.register("gated_output_norm_sum", of="expert")
def gated_output_norm_sum(routed: ExpertTokens) -> Tensor:
    """Sum over the routed tokens of |g_t f_i(x_t)|, g as the model applies it, (N,)."""
    return (routed.gates.abs() * routed.outputs.norm(dim=-1)).sum()
