"""The logit of a group is fitted to the log of the sum of its members' exponentials."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..observation.observed import sum_dtype
from ..router_rows import ROUTER_ROWS
from ..types import ExpertGroups

RIDGE = 1e-3


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for a ridge that is not positive."""
    ridge = options["ridge"]
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge is {ridge!r}, it must be a positive number. Leave it out for {RIDGE}.")


def group_logits(logits: Tensor, groups: ExpertGroups) -> Tensor:
    """Log of the sum over each group's members of exp(logit), (T, M) from (T, N); dropped experts are left out.

    The softmax of these are the summed probabilities of the members, among all experts that stay.
    """
    members = [groups.members(group).to(logits.device) for group in range(groups.num_groups)]
    return torch.stack([logits[:, slots].logsumexp(1) for slots in members], dim=1)


@ROUTER_ROWS.register("log_sum_exp", softmax=True, check=check_options)
def log_sum_exp(rows: Tensor, groups: ExpertGroups, *, tokens: Sequence[Tensor], ridge: float = RIDGE) -> Tensor:
    """Ridge least squares: min over R of sum_t |R x_t - z_t|^2 + ridge * mean energy * |R - R0|^2.

    z_t[m] = log of the sum over the members of m of exp(logit): a softmax over the M groups then gives each the summed
    probability of its members. R0 are the rows of the dominants, to which inputs that were not seen leave it. A
    softmax does not see a number that is added to all logits of a token, so the part of the error that all groups
    share is taken out of the target first. Ours; no publication is known to do this, and it raised the error of
    synthetic layers: the pipeline keeps it only where held-out tokens are better off.

    Memory: 8 D_r (D_r + M) bytes, for the sums of x x^T and of x (z - R0 x)^T. Time: T D_r (D_r + N) + D_r^3.

    Args:
        rows: Of all slots, (N, D_r).
        groups: Which slots became one.
        tokens: What the router was given, (t, D_r) each.
        ridge: Times the mean over inputs of their energy, sum_t x_t[d]^2.

    Returns:
        (M, D_r); R0 where there are no tokens.
    """
    start = rows[groups.dominant_of_group.to(rows.device)]
    size, dtype = rows.shape[1], sum_dtype(rows.device)
    gram = torch.zeros(size, size, dtype=dtype, device=rows.device)
    cross = torch.zeros(size, len(start), dtype=dtype, device=rows.device)
    for batch in tokens:
        inputs = batch.to(rows)
        missing = group_logits(inputs @ rows.T, groups) - inputs @ start.T
        missing = missing - missing.mean(dim=1, keepdim=True)
        gram += inputs.T @ inputs
        cross += inputs.T @ missing
    energy = gram.diagonal().mean()
    if energy == 0:
        return start
    gram.diagonal().add_(ridge * energy)
    return start + torch.linalg.solve(gram, cross).T
