"""How much energy the outputs of experts have where the router uses them."""

from torch import Tensor

from ..saliency import SALIENCY
from ..types import ExpertWeights, LayerStatistics
from .output_norms import mean_over_routed


@SALIENCY.register("squared_output_norm", needs=("selection_count", "squared_output_norm_sum"))
def squared_output_norm(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Mean over an expert's routed tokens of |f_i(x_t)|^2, (N,) float64; 0 for an expert that was never used.

    MSAN of "task-agnostic expert pruning" (https://arxiv.org/abs/2606.15716), of which only the abstract was read:
    neither gate nor frequency enters.
    """
    return mean_over_routed(statistics, "squared_output_norm_sum")
