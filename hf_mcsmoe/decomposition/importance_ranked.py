"""Truncated SVD of each matrix, of the larger rank the more important its expert is."""

from torch import Tensor

from ..decomposition import DECOMPOSITION
from ..expert_values import LowRankSparse
from ..solvers.low_rank import decompose


@DECOMPOSITION.register("importance_ranked", ranked=True)
def importance_ranked(
    matrix: Tensor, input_gram: Tensor | None = None, row_scores: Tensor | None = None, *, rank: int | None = None
) -> LowRankSparse:
    """W = left right, the truncated SVD; important experts of a layer get larger ranks than others.

    The second stage of MoE-I2 (Yang et al., 2024, https://arxiv.org/abs/2411.01016), known second-hand: ranks are in
    proportion to the recipe's `importance` (`apportion`), at least 1 and at most full. They are not an option: `keep`
    is the share of the numbers of all experts, of which `keep_experts` (the root of `keep` unless it is given) of the
    experts stay and the ranks take the rest.

    Args:
        matrix: W (O, I), any float dtype; the result has it too.
        input_gram: Not read.
        row_scores: Not read.
        rank: r, set by the pipeline.
    """
    return decompose(matrix, None, None, rank=rank, num_rows=0, alternations=0)
