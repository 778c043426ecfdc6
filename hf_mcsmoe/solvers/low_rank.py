"""W (O, I) = left (O, r) @ right (r, I) + a few rows: the budget, the best factors, and which rows they leave."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..expert_values import LowRankSparse

DEFAULT_RANK = 32


def check_budget(options: Mapping[str, Any]) -> None:
    """Refuse options of a decomposition that no matrix could have, whatever its shape.

    Args:
        options: Those that are given of `rank`, `parameter_ratio`, `keep_rows` and `alternations`; None is not given.

    Raises:
        ValueError: Both rank and ratio; a rank below 1, a number of alternations below 0, or no whole number; a ratio
            not in (0, 1] or a share of rows not in [0, 1].
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "rank" in given and "parameter_ratio" in given:
        raise ValueError(
            f"rank is {given['rank']} and parameter_ratio is {given['parameter_ratio']}; they say the same. "
            "Give one of them."
        )
    for name, least in (("rank", 1), ("alternations", 0)):
        value = given.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name} is {value!r}, it must be a whole number >= {least}. Leave it out for the default."
            )
    ratio, keep_rows = given.get("parameter_ratio", 1.0), given.get("keep_rows", 1.0)
    if not (_is_real(ratio) and 0 < ratio <= 1):
        raise ValueError(
            f"parameter_ratio is {ratio!r}, it must be in (0, 1]. 0.1 gives the factors a tenth of the matrix."
        )
    if not (_is_real(keep_rows) and 0 <= keep_rows <= 1):
        raise ValueError(f"keep_rows is {keep_rows!r}, it must be in [0, 1]. 0.1 keeps every tenth row.")


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def resolve_rank(shape: tuple[int, int], rank: int | None = None, parameter_ratio: float | None = None) -> int:
    """The rank that is meant for a matrix (O, I).

    Args:
        shape: (O, I).
        rank: The rank itself.
        parameter_ratio: The share of O * I numbers that the two factors may take: rank = ceil(ratio * O I / (O + I)),
            as in the code of MC-SMoE. So a ratio (D + I) r / (D I) gives r for all matrices of an expert.

    Returns:
        `rank`, or the rank of the ratio; 32 (the paper's) where neither is given.

    Raises:
        ValueError: Both are given, or one is out of range: 1 <= rank <= min(O, I).
    """
    check_budget({"rank": rank, "parameter_ratio": parameter_ratio})
    outputs, inputs = shape
    if parameter_ratio is not None:
        rank = math.ceil(parameter_ratio * outputs * inputs / (outputs + inputs))
    rank = DEFAULT_RANK if rank is None else rank
    if rank > min(outputs, inputs):
        raise ValueError(
            f"rank is {rank}, it must be a whole number from 1 to {min(outputs, inputs)} for a matrix "
            f"({outputs}, {inputs}). Lower the rank."
        )
    return rank


def num_kept_rows(keep_rows: float, num_rows: int) -> int:
    """How many of `num_rows` rows the share `keep_rows` keeps: rounded half up.

    Raises:
        ValueError: `keep_rows` is not in [0, 1].
    """
    check_budget({"keep_rows": keep_rows})
    return math.floor(keep_rows * num_rows + 0.5)


def decompose(
    matrix: Tensor,
    metric: Tensor | None,
    row_scores: Tensor | None,
    *,
    rank: int,
    num_rows: int,
    alternations: int,
) -> LowRankSparse:
    """Factors that minimise ||(matrix - left right - sparse) metric||_F, and the rows that they miss by most.

    Rows that are kept are exact whatever the factors are, so factors and rows belong together: given the rows,
    the best factors are those of the other rows; given the factors, the best rows are those with the largest
    error. Alternating can only lower the error; it ends early when the rows stay the same. With 0 alternations
    the factors fit all rows, and then rows are chosen: the paper's initialisation.

    Args:
        matrix: W (O, I), any float dtype.
        metric: C (I, s), from `input_metric`; None for the identity.
        row_scores: (O,): keep the rows with the largest score instead of the largest error.
        rank: r.
        num_rows: K, the rows to keep.
        alternations: How often the factors are fitted again to the rows that are not kept.

    Returns:
        Factors in the dtype of `matrix`, the norms of both shared equally. The sparse rows are the difference to
        the product of the *rounded* factors, so that a kept row is off by one rounding, not by three. Computed in
        float64. Ties between rows break by index.
    """
    exact = matrix.double()
    kept = torch.zeros(len(matrix), dtype=torch.bool, device=matrix.device)
    alternations = 0 if num_rows == len(matrix) else alternations  # nothing would be left to fit
    for step in range(alternations + 1):
        left, right = fit_factors(exact, metric, rank, ~kept)
        if num_rows == 0:
            break
        before, kept = kept, _largest(_row_errors(exact, left @ right, metric, row_scores), num_rows)
        if step == alternations or torch.equal(before, kept):
            break
    left, right = balance(left, right, rank, matrix.dtype)
    rows = kept.nonzero().flatten()
    sparse = exact[rows] - left[rows].double() @ right.double()
    return LowRankSparse(left=left, right=right, rows=rows, sparse=sparse.to(matrix.dtype))


def input_metric(gram: Tensor) -> Tensor:
    """C (I, s) with C C^T = Gram of the inputs (I, I), s its numerical rank; float64.

    The Cholesky factor where all its pivots are more than rounding of a float64 sum, in a tenth of the time of the
    eigenvectors, which are taken otherwise. Of these, eigenvalues below I * eps of the largest are rounding: they
    belong to directions in which no input was seen, and are left out exactly. s is 0 for inputs that are all zero.
    """
    gram = gram.double()
    factor, is_singular = torch.linalg.cholesky_ex(gram)
    # A pivot may be I times as large as the least eigenvalue.
    if not is_singular and (factor.diagonal().square() > _rounding(gram.diagonal().sum(), len(gram) ** 2)).all():
        return factor
    values, vectors = torch.linalg.eigh(gram)
    seen = values > _rounding(values.amax(), len(gram))
    return vectors[:, seen] * values[seen].sqrt()


def fit_factors(matrix: Tensor, metric: Tensor | None, rank: int, fitted: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (O, q) and (q, I), q <= rank, that are best for the rows `fitted`.

    With X = matrix @ metric and V its leading right singular vectors over the fitted rows, the product is X V V^T
    in the metric. Its right factor is had without inverting the metric: right = (X V / sigma^2)^T matrix over the
    fitted rows, which solves the same problem and, given `left`, the plain one for directions that no input had.
    Where fewer than `rank` directions have an error in the metric, the rest of the rank goes into the plain
    truncated SVD of what remains of the fitted rows; q < `rank` when nothing remains.

    Args:
        matrix: W (O, I) float64.
        metric: C (I, s) float64; None for the identity.
        rank: r.
        fitted: (O,) bool; the other rows are projected on the same right factor.
    """
    residual, lefts, rights = matrix, [], []
    for inputs in (metric, None):
        wanted = rank - sum(left.shape[1] for left in lefts)
        if wanted == 0:
            break
        if lefts:
            residual = matrix - lefts[-1] @ rights[-1]
        seen = residual if inputs is None else residual @ inputs
        scale = (matrix if lefts else seen).square().sum()  # before anything was taken out
        values, vectors = _leading_directions(seen[fitted], wanted, scale)
        left = seen @ vectors
        right = (left[fitted] / values).T @ residual[fitted]
        lefts.append(left)
        rights.append(right)
    return torch.cat(lefts, dim=1), torch.cat(rights)


def balance(left: Tensor, right: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same product from factors U sqrt(D) (O, rank) and sqrt(D) V^T (rank, I), with zeros past their rank."""
    left_basis, left_part = torch.linalg.qr(left)
    right_basis, right_part = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(left_part @ right_part.T, full_matrices=False)
    missing = rank - values.numel()
    new_left = torch.nn.functional.pad(left_basis @ u * values.sqrt(), (0, missing))
    new_right = torch.nn.functional.pad(values.sqrt()[:, None] * (v @ right_basis.T), (0, 0, 0, missing))
    return new_left.to(dtype).contiguous(), new_right.to(dtype).contiguous()


def _leading_directions(matrix: Tensor, count: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of at most `count` leading singular values (q,), and their right singular vectors (I, q).

    From the smaller Gram matrix: a quarter of the time of an SVD. Squares below the rounding of `scale` are zero.
    """
    outputs, inputs = matrix.shape
    if outputs >= inputs:
        values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    else:
        values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    nonzero = values > _rounding(scale, max(outputs, inputs))
    values, vectors = values[nonzero], vectors[:, nonzero]
    return values, vectors if outputs >= inputs else matrix.T @ (vectors / values.sqrt())


def _rounding(scale: Tensor, size: int) -> Tensor:
    """What a float64 sum of `size` products that adds up to `scale` may be off by."""
    return scale * size * torch.finfo(torch.float64).eps


def _row_errors(matrix: Tensor, product: Tensor, metric: Tensor | None, row_scores: Tensor | None) -> list[Tensor]:
    """What rows are kept by, (O,) each, the most important first."""
    if row_scores is not None:
        return [row_scores]
    residual = matrix - product
    errors = [residual.square().sum(1)]
    if metric is None:
        return errors
    seen, scale = (residual @ metric).square().sum(1), (matrix @ metric).square().sum()
    # What is rounding must not decide between rows that are all exact for the inputs.
    return [seen.masked_fill(seen <= _rounding(scale, max(matrix.shape)), 0), *errors]


def _largest(keys: list[Tensor], count: int) -> Tensor:
    """(O,) bool: the `count` rows with the largest first key; ties by the next one, then by index."""
    order = torch.arange(keys[0].numel(), device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(descending=True, stable=True)]
    chosen = torch.zeros(keys[0].numel(), dtype=torch.bool, device=keys[0].device)
    chosen[order[:count]] = True
    return chosen
