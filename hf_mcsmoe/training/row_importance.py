"""How much the rows of sparse parts matter: a moving average of |S * dL/dS|, and the most important of all rows."""

import torch
from torch import Tensor


def row_scores(values: Tensor, gradient: Tensor) -> Tensor:
    """Mean over a row of |S * dL/dS|: what zeroing its numbers would change the loss by, to first order.

    The mean, not the paper's sum: under one threshold for matrices of different widths, a sum favours wide rows.

    Args:
        values: S (K, I).
        gradient: dL/dS (K, I).

    Returns:
        (K,) float32.
    """
    return (values.detach().float() * gradient.detach().float()).abs().mean(1)


class RowImportance:
    """Moving average of the scores of rows, for each parameter by name.

        average_t = beta * average_(t-1) + (1 - beta) * score_t,    average_0 = 0

    As in MC-SMoE (Li et al., 2024, https://arxiv.org/abs/2310.01334), with beta its 0.85. Its code averages in the
    score of the step before, so that pruning is always one step late; here it is that of the step itself.

    Args:
        beta: In [0, 1).

    Raises:
        ValueError: `beta` is not in [0, 1).
    """

    def __init__(self, beta: float = 0.85):
        if isinstance(beta, bool) or not 0 <= beta < 1:
            raise ValueError(f"beta is {beta!r}, it must be in [0, 1). 0 takes the last step alone, the paper 0.85.")
        self.beta = beta
        self.average: dict[str, Tensor] = {}  # (K,) float32 each

    def update(self, scores: dict[str, Tensor]) -> None:
        """Average in the scores (K,) of one step, by name; always the same names."""
        for name, score in scores.items():
            average = self.average.setdefault(name, torch.zeros_like(score))
            average.mul_(self.beta).add_(score, alpha=1 - self.beta)


def most_important(importance: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The `count` most important rows of all parameters together, exactly; ties go to the earlier name and row.

    Args:
        importance: (K,) by name; on any devices.
        count: How many rows, in [0, sum of K].

    Returns:
        (K,) bool by name, each on the device of its importance. Nothing is read by the host.
    """
    sizes = [one.numel() for one in importance.values()]
    first = next(iter(importance.values()))
    joined = torch.cat([one.to(first.device) for one in importance.values()])
    chosen = torch.zeros_like(joined, dtype=torch.bool)
    chosen[joined.argsort(descending=True, stable=True)[:count]] = True
    parts = zip(importance.items(), chosen.split(sizes), strict=True)
    return {name: part.to(one.device) for (name, one), part in parts}
