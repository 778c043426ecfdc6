"""How much an expert gives to the tokens that its layer changes."""

from torch import Tensor

from ..saliency import SALIENCY
from ..types import ExpertWeights, LayerStatistics


@SALIENCY.register("residual_change", needs=("residual_change_sum",))
def residual_change(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Sum over an expert's routed tokens of |g_t f_i(x_t)| max(1 - cos(before, after), 0), (N,) float64.

    The score of EASY-EP (domain-specific expert pruning with few demonstrations, 2025): `before` and `after` are the
    residual stream around the routed experts. A sum, not a mean: frequency counts, so the calibration data should be
    the demonstrations of the domain that the model is to keep. Of several domains it keeps what matters most in all
    together; the paper's scaling of every domain's scores before they are added needs one run a domain and is left
    out.
    """
    return statistics["residual_change_sum"]
