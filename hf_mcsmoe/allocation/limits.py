"""The least and the largest number of experts that a layer may keep."""

from collections.abc import Sequence
from typing import Any


def limits(sizes: Sequence[int], total: int, min_experts: int, max_experts: int | None) -> list[int]:
    """The most that each layer may keep.

    Args:
        sizes: N of each layer.
        total: Experts that all layers keep together.
        min_experts: Least number of experts a layer keeps.
        max_experts: Largest number of experts a layer keeps; None for no limit.

    Raises:
        ValueError: The limits leave no way to spend the budget exactly.
    """
    most = [size if max_experts is None else min(size, max_experts) for size in sizes]
    if min_experts < 1 or not len(sizes) * min_experts <= total <= sum(most) or any(min_experts > m for m in most):
        raise ValueError(
            f"A budget of {total} experts over {len(sizes)} layers cannot keep at least min_experts={min_experts} and "
            f"at most max_experts={max_experts} of {list(sizes)} experts in each. Change keep, min_experts or "
            "max_experts."
        )
    return most


def check_limits(sizes: Sequence[int], budget_of_layer: Sequence[int], options: dict[str, Any]) -> None:
    """`limits` as the trait check_budget of a rule with the options min_experts and max_experts."""
    limits(sizes, sum(budget_of_layer), options["min_experts"], options["max_experts"])
