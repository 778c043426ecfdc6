"""How much the output of a layer changes when an expert is left out."""

from torch import Tensor

from ..saliency import SALIENCY
from ..types import ExpertWeights, LayerStatistics


@SALIENCY.register("left_out_change", needs=("chosen_gram",))
def left_out_change(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """|F(X) - F without e (X)|_F over the calibration tokens, (N,) float64; 0 for an expert that was never used.

    The importance of MoE-I2 (Yang et al., 2024, https://arxiv.org/abs/2411.01016). The weights of a token's other
    experts are taken as they are, not renormalised: what the mapped layout does.
    """
    return statistics["chosen_gram"].diagonal().sqrt()
