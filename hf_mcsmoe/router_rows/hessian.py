"""Router rows in the metric of the softmax: an error of a logit counts where it moves probabilities."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..router_rows import ROUTER_ROWS
from ..types import ExpertGroups
from .log_sum_exp import group_logits


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for a tolerance, a number of iterations or a factor that cannot be meant."""
    tolerance, iterations, off_diagonal = (options[name] for name in ("tolerance", "iterations", "off_diagonal"))
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance!r}, it must be in (0, 1). Leave it out for 1e-6.")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}, it must be a whole number >= 1. Leave it out for 100.")
    is_number = isinstance(off_diagonal, int | float) and not isinstance(off_diagonal, bool)
    if not is_number or not math.isfinite(off_diagonal) or not 0 <= off_diagonal <= 1:
        raise ValueError(f"off_diagonal is {off_diagonal!r}, it must be in [0, 1]. 1 is the Hessian itself.")


@ROUTER_ROWS.register("hessian", softmax=True, check=check_options)
def hessian_weighted_rows(
    rows: Tensor,
    groups: ExpertGroups,
    *,
    tokens: Sequence[Tensor],
    tolerance: float = 1e-6,
    iterations: int = 100,
    off_diagonal: float = 0.9,
) -> Tensor:
    """Min over R of sum_t (R x_t - z_t)^T H_t (R x_t - z_t), H_t = diag(p_t) - p_t p_t^T, p_t = softmax(z_t).

    z_t[m] is the log of the sum of exp(logit) over the members of m, so p_t is the probability of each group under the
    original router, and H_t the Hessian of the cross-entropy to it: second-order router distillation in closed
    form. After HARC (2026, https://arxiv.org/abs/2606.03391), which merges the routers of several models this way. The
    normal equation sum_t H_t R x_t x_t^T = sum_t H_t z_t x_t^T is solved by conjugate gradients that start at the rows
    of the dominants and never form its matrix; inputs that were not seen leave those rows as they are.

    Deviations: HARC allows 1000 iterations, here it is an option; like there, `off_diagonal` damps what H_t has beside
    its diagonal. Everything is in the dtype of `rows`, float64 in the pipeline.

    Memory: 8 T M bytes for p, a copy of one batch of `tokens` in float64 at a time, 8 * 5 M D_r for the iteration.
    Time: 4 T M D_r for each iteration.

    Args:
        rows: Of all slots, (N, D_r).
        groups: Which slots became one.
        tokens: What the router was given, (t, D_r) each.
        tolerance: Ends where the norm of the residual is at most this times that at the start.
        iterations: At most so many.
        off_diagonal: Factor in [0, 1] of the entries of p p^T off the diagonal.

    Returns:
        (M, D_r); the rows of the dominants where there are no tokens.
    """
    start = rows[groups.dominant_of_group.to(rows.device)]
    targets = [group_logits(batch.to(rows) @ rows.T, groups) for batch in tokens]
    probabilities = [target.softmax(1) for target in targets]

    def weigh(errors: Tensor, p: Tensor) -> Tensor:
        # H e = p e (1 - p) - c (p (p . e) - p^2 e), row by row
        inner = (p * errors).sum(1, keepdim=True)
        return p * (errors - p * errors) - off_diagonal * p * (inner - p * errors)

    def product(change: Tensor) -> Tensor:
        total = torch.zeros_like(change)
        for batch, p in zip(tokens, probabilities, strict=True):
            inputs = batch.to(rows)
            total += weigh(inputs @ change.T, p).T @ inputs
        return total

    residual = torch.zeros_like(start)
    for batch, target, p in zip(tokens, targets, probabilities, strict=True):
        inputs = batch.to(rows)
        residual += weigh(target - inputs @ start.T, p).T @ inputs
    return start + conjugate_gradients(product, residual, tolerance, iterations)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, iterations: int
) -> Tensor:
    """X with product(X) = right for a symmetric positive semidefinite operator, from X = 0.

    Args:
        product: Linear.
        right: In the range of the operator.
        tolerance: Of the norm of the residual, relative to that of `right`.
        iterations: At most so many.
    """
    solution, residual, direction = torch.zeros_like(right), right, right
    energy = first = residual.square().sum()
    for _ in range(iterations):
        if energy <= tolerance**2 * first:
            break
        image = product(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:  # rounding: there is nothing left to descend along
            break
        step = energy / curvature
        solution = solution + step * direction
        residual = residual - step * image
        before, energy = energy, residual.square().sum()
        direction = residual + (energy / before) * direction
    return solution
