"""Sums of what experts give on the tokens that were routed to them."""

from torch import Tensor

from ..observation.observed import ExpertTokens, ObservedTokens, sum_dtype
from ..statistics import STATISTICS


@STATISTICS.register("routed_output_sum", of="expert")
def routed_output_sum(routed: ExpertTokens) -> Tensor:
    """Sum over the routed tokens of f_i(x_t), (N, D). Memory: 8 N D bytes.

    In float64 from the start: variances are differences of its square.
    """
    return routed.outputs.to(sum_dtype(routed.outputs.device)).sum(0)


@STATISTICS.register("squared_gate_output_sum", of="expert")
def squared_gate_output_sum(routed: ExpertTokens) -> Tensor:
    """Sum over the routed tokens of g_t^2 f_i(x_t), (N, D). Memory: 8 N D bytes."""
    dtype = sum_dtype(routed.outputs.device)
    return routed.gates.to(dtype).square() @ routed.outputs.to(dtype)


@STATISTICS.register("squared_gate_sum", of="slots")
def squared_gate_sum(observed: ObservedTokens) -> Tensor:
    """Sum of the squared weights given to each slot, (N,). Memory: 8 N bytes."""
    return observed.sum_by_slot(observed.top_k_weights.to(sum_dtype(observed.top_k_weights.device)).square())
