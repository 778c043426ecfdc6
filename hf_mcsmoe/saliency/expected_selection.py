"""How strongly a task's tokens ask the router for each expert."""

from torch import Tensor

from ..saliency import SALIENCY
from ..types import ExpertWeights, LayerStatistics


@SALIENCY.register("expected_selection", needs=("top_logit_sum",))
def expected_selection(statistics: LayerStatistics, weights: ExpertWeights) -> Tensor:
    """Mean over a task's tokens of the router logit of an expert where it is the largest, else 0; (N,) float64.

    The task-conditioned expected selection score (TCESS) of PreMoe (2025, https://arxiv.org/abs/2505.17639) as its
    code computes it: only the first choice of each token counts, and a logit of -1 or less as 0. Only the router is
    looked at. Logits may be negative, so an expert that is chosen weakly can come after one that never is.
    """
    return statistics["top_logit_sum"] / max(1, statistics.num_tokens)
