"""Trim, elect signs, and average what agrees."""

import torch
from torch import Tensor

from ..merging import MERGING
from ..observation.observed import sum_dtype
from ..option_checks import check_real
from ..registry import closest

BASES = ("dominant", "mean")
# Differences from a mean add up to 0 where all of them stay; rounding must not elect a sign there.
SAME = 2.0**-40


def check_ties(options: dict) -> None:
    """Raise ValueError for a density or scale out of range, or an unknown base."""
    check_real("density", 0, 1, "0.2 keeps the largest fifth of each difference.")(options)
    check_real("scale", 0, 1_000_000, "1 adds the merged differences as they are.")(options)
    if options["base"] not in BASES:
        raise ValueError(f"base is {options['base']!r}, allowed are {BASES}.{closest(options['base'], BASES)}")


@MERGING.register("ties", check=check_ties)
def merge_by_ties(
    members: Tensor, importance: Tensor, *, density: float = 0.2, scale: float = 1.0, base: str = "dominant"
) -> Tensor:
    """Add to a base what the members' largest differences from it agree on.

    TIES (Yadav et al., 2023, https://arxiv.org/abs/2306.01708), with an expert's matrix in place of a model's: of
    each difference t_i = W_i - B the largest entries stay, each entry elects the sign of their sum, and the entries of
    that sign are averaged: W = B + scale * mean. The public code of REAP adds B - W_i by mistake, away from the
    members. Experts share no pre-trained ancestor unless they were upcycled, so B is one of them or their mean, and
    with two members the base "mean" gives the mean itself.

    Memory: three copies of the members in float64.

    Args:
        members: (m, O, I) float32, aligned; row 0 is the dominant expert.
        importance: Not used: TIES counts members alike.
        density: Share of the entries of each member's difference that stay, rounded up; of entries of equal size
            those come first that lie first.
        scale: Of what is added.
        base: "dominant" or "mean".

    Returns:
        The merged matrix, (O, I) float32.
    """
    wide = members.to(sum_dtype(members.device))
    start = wide[0] if base == "dominant" else wide.mean(dim=0)
    differences = torch.stack([trim(member - start, density) for member in wide])
    total = differences.sum(dim=0)
    elected = torch.where(total.abs() > SAME * differences.abs().sum(dim=0), total.sign(), 0)
    agrees = (differences.sign() == elected) & (elected != 0)
    merged = (differences * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
    return (start + scale * merged).float()


def trim(difference: Tensor, density: float) -> Tensor:
    """The largest entries, the others 0."""
    number = -int(-density * difference.numel() // 1)
    largest = difference.abs().flatten().argsort(descending=True, stable=True)[:number]
    kept = torch.zeros_like(difference).flatten()
    return kept.index_copy(0, largest, difference.flatten()[largest]).view_as(difference)
