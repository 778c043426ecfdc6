"""How much energy the outputs of experts have on the tokens that were routed to them."""

from torch import Tensor

from ..observation.observed import ExpertTokens, sum_dtype
from ..statistics import STATISTICS


@STATISTICS.register("squared_output_norm_sum", of="expert")
def squared_output_norm_sum(routed: ExpertTokens) -> Tensor:
    """Sum over the routed tokens of |f_i(x_t)|^2, (N,). Memory: 8 N bytes.

    In float64 from the start: variances are differences of it.
    """
    return routed.outputs.to(sum_dtype(routed.outputs.device)).square().sum()
