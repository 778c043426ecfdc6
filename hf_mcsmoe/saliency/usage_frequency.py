"""How often the router selected each expert."""

from torch import Tensor

from ..saliency import SALIENCY
from ..types import ExpertWeights, LayerStatistics


@SALIENCY.register("usage_frequency", needs=("selection_count",))
def usage_frequency(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Share of a layer's selections that went to each expert, (N,) float64.

    The score of M-SMoE (Li et al., 2024, section 3.2, https://arxiv.org/abs/2310.01334). Unlike the public
    code, padding, zero-weight slots and tokens dropped by a capacity limit are not counted. All zero if
    the layer saw no token.
    """
    return statistics.usage_frequency
