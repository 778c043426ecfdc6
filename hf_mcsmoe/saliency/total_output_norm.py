"""How much an expert gives in all."""

from torch import Tensor

from ..saliency import SALIENCY
from ..types import ExpertWeights, LayerStatistics


@SALIENCY.register("total_output_norm", needs=("output_norm_sum",))
def total_output_norm(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Sum over an expert's routed tokens of |f_i(x_t)|, (N,) float64: often used experts have more.

    The expert activation norm (EAN), a baseline of REAP (Lasby et al., 2025, https://arxiv.org/abs/2510.13999). The
    gate does not enter.
    """
    return statistics["output_norm_sum"]
