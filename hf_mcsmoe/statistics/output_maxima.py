"""How large single numbers of the outputs of experts become."""

from torch import Tensor

from ..observation.observed import ExpertTokens
from ..statistics import STATISTICS


@STATISTICS.register("output_max", of="expert", combine="max")
def output_max(routed: ExpertTokens) -> Tensor:
    """Largest |f_i(x_t)[d]| over the routed tokens and dimensions, (N,); 0 without tokens. Memory: 8 N bytes."""
    outputs = routed.outputs.abs()
    return outputs.amax() if outputs.numel() else outputs.new_zeros(())
