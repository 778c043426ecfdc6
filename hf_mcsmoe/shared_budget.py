"""How large the parts of experts that share something may be: the share `keep` of the numbers of their matrices."""

import math
from dataclasses import dataclass
from typing import Any

ALIGNED_RANK = 8  # 16 bytes in 16-bit dtypes: rows that grouped kernels can take
LEAST_ALIGNED = 64  # ranks from here on are rounded down to such rows


@dataclass(frozen=True)
class BaseBudget:
    """Sizes of a base with a low rank and a few rows for each of N experts."""

    rank: int  # r, of every matrix
    num_rows: dict[str, int]  # kept rows of an expert, by matrix


def base_budget(sizes: dict[str, tuple[int, int]], num_experts: int, keep: float, rows: float) -> BaseBudget:
    """What a base leaves for each expert: O I + N (r (O + I) + rows * I) <= keep * N O I, for each matrix (O, I).

    Rows come first, whole ones, then the largest rank that fits into all matrices; from 64 on a multiple of 8.

    Args:
        sizes: (O, I) of each matrix.
        num_experts: N.
        keep: In (0, 1).
        rows: Share of what the base leaves that goes to whole rows, in [0, 1).

    Raises:
        ValueError: Nothing is left for a rank of 1. The message says the least `keep`.
    """
    left = {m: (keep * num_experts - 1) * o * i / num_experts for m, (o, i) in sizes.items()}
    num_rows = {m: max(0, math.floor(rows * left[m] / i)) for m, (_, i) in sizes.items()}
    rank = min(math.floor((left[m] - num_rows[m] * i) / (o + i) + 1e-9) for m, (o, i) in sizes.items())
    if rank < 1:
        least = max(1 / num_experts + (o + i) / (o * i) / (1 - rows) for o, i in sizes.values())
        raise ValueError(
            f"keep is {keep}, but a base takes {1 / num_experts:.3g} of {num_experts} experts and leaves no rank for "
            f"each. Use at least about {least:.3g}."
        )
    return BaseBudget(aligned(rank), num_rows)


def latent_size(sizes: dict[str, tuple[int, int]], num_experts: int, keep: float) -> int:
    """The largest m with N m (I for each matrix) + 2 m D <= keep * N (D I for each matrix).

    Args:
        sizes: (O, I) of each matrix; gate and up read D numbers, down gives D.
        num_experts: N.
        keep: In (0, 1).

    Raises:
        ValueError: Not even one latent number fits.
    """
    width, hidden = sizes["up"]
    size = math.floor(
        keep * num_experts * len(sizes) * width * hidden / (num_experts * len(sizes) * width + 2 * hidden)
    )
    if size < 1:
        raise ValueError(
            f"keep is {keep}, which leaves no latent number for {num_experts} experts. Use a larger keep."
        )
    return aligned(min(size, hidden))


def aligned(rank: int) -> int:
    """`rank`, from 64 on rounded down to a multiple of 8."""
    return rank if rank < LEAST_ALIGNED else rank // ALIGNED_RANK * ALIGNED_RANK


def check_rows(options: dict[str, Any]) -> None:
    """Raise ValueError for a share `rows` that is not in [0, 1)."""
    rows = options["rows"]
    if isinstance(rows, bool) or not isinstance(rows, int | float) or not 0 <= rows < 1:
        raise ValueError(f"rows is {rows!r}, it must be in [0, 1). 0.25 gives a quarter of the rest to whole rows.")


def check_count(options: dict[str, Any], name: str, least: int) -> None:
    """Raise ValueError for an option that is no whole number >= `least`."""
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, it must be a whole number >= {least}.")


def check_ridge(options: dict[str, Any]) -> None:
    """Raise ValueError for a ridge that is no number >= 0."""
    ridge = options["ridge"]
    is_number = isinstance(ridge, int | float) and not isinstance(ridge, bool)
    if not is_number or not math.isfinite(ridge) or ridge < 0:
        raise ValueError(f"ridge is {ridge!r}, it must be a number >= 0. 0.01 adds a hundredth of the mean energy.")
