"""Truncated SVD in the metric of the calibration inputs, and the rows whose outputs it misses by most."""

from torch import Tensor

from ..decomposition import DECOMPOSITION
from ..expert_values import LowRankSparse
from ..solvers.low_rank import decompose, input_metric, num_kept_rows, resolve_rank


@DECOMPOSITION.register("whitened_low_rank_sparse", needs=("input_gram",))
def whitened_low_rank_sparse(
    matrix: Tensor,
    input_gram: Tensor | None,
    row_scores: Tensor | None = None,
    *,
    rank: int | None = None,
    parameter_ratio: float | None = None,
    keep_rows: float = 0.1,
    alternations: int = 8,
) -> LowRankSparse:
    """Minimise the error of the outputs, ||(W - left right - sparse) X||_F, over the calibration inputs X (I, T).

    That is the error in the metric C with C C^T = X X^T = G; without kept rows, the truncated SVD of W C solves it
    (SVD-LLM, Wang et al., 2024, https://arxiv.org/abs/2403.07378). Row a is off by s_a^T G s_a with s = W - left
    right. Deviations from the public codes of SVD-LLM and D2-MoE (https://arxiv.org/abs/2502.17298): C comes from
    eigenvectors, not from a Cholesky factor, so that no ridge is needed where fewer than I inputs were seen; C is
    never inverted; and factors are fitted to the rows that are not kept, alternating (see `decompose`).

    Directions that no input had do not count in the metric. For them `right` is the best one for the given `left`
    in the plain norm, and rank that no seen direction needs is spent on the plain SVD of the rest. So a Gram of
    zeros (an expert without tokens) gives the plain decomposition, and a rank of min(O, I) gives W.

    Args:
        matrix: W (O, I), any float dtype; the result has it too.
        input_gram: G (I, I), symmetric: the sum over tokens of the outer product of what W is multiplied with.
        row_scores: (O,); the rows with the largest scores are kept instead of those with the largest output error.
        rank: r; 32 if neither it nor `parameter_ratio` is given.
        parameter_ratio: r = ceil(ratio * O * I / (O + I)).
        keep_rows: Share of the O rows to keep, rounded half up to whole rows.
        alternations: At most so many times, rows are chosen and the factors fitted to the others; it ends where the
            rows stay the same, mostly after 2 or 3. 0 takes the rows after one fit of all.

    Returns:
        Factors and rows; ties between rows break by the plain norm of s_a, then by index.

    Raises:
        ValueError: No Gram, or not of that shape; a rank, ratio or share out of range, or both rank and ratio.
    """
    rank, num_rows = resolve_rank(tuple(matrix.shape), rank, parameter_ratio), num_kept_rows(keep_rows, len(matrix))
    inputs = matrix.shape[1]
    if input_gram is None or tuple(input_gram.shape) != (inputs, inputs):
        given = None if input_gram is None else tuple(input_gram.shape)
        raise ValueError(
            f"input_gram has shape {given}, it must be ({inputs}, {inputs}) for a matrix {tuple(matrix.shape)}. "
            "Collect it on calibration inputs, or use decomposition 'low_rank_sparse', which needs none."
        )
    metric = input_metric(input_gram.to(matrix.device))
    return decompose(matrix, metric, row_scores, rank=rank, num_rows=num_rows, alternations=alternations)
