"""Whole numbers in proportion to weights, with bounds and an exact sum."""

import heapq
from collections.abc import Sequence


def apportion(weights: Sequence[float], total: int, least: int, most: int) -> list[int]:
    """`total` as a sum of whole numbers in [least, most], in proportion to weights: Webster's method.

    Each gets `least`; the next one goes where weight / (2 n + 1) is largest, n being there already, ties to the one
    that has fewer, then to the lower one.

    Args:
        weights: >= 0; those of 0 get more than `least` only when all others have `most`.
        total: In [least * len, most * len].
        least: >= 0.
        most: >= least.

    Raises:
        ValueError: The bounds leave no way to do it.
    """
    if not least * len(weights) <= total <= most * len(weights):
        raise ValueError(f"total is {total}, {len(weights)} numbers in {least}..{most} cannot add up to it.")
    found = [least] * len(weights)
    waiting = [(-weight / (2 * least + 1), least, place) for place, weight in enumerate(weights) if least < most]
    heapq.heapify(waiting)
    for _ in range(total - sum(found)):
        _, _, place = heapq.heappop(waiting)
        found[place] += 1
        if found[place] < most:
            heapq.heappush(waiting, (-weights[place] / (2 * found[place] + 1), found[place], place))
    return found
