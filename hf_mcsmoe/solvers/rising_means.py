"""Numbers levelled until they rise."""

from collections.abc import Sequence


def rising_means(values: Sequence[float]) -> list[float]:
    """The non-decreasing numbers nearest to `values` in squared error, by pooling adjacent violators.

    Where values fall, neighbours become their mean, so the sums of the first ones become the greatest convex curve
    below those of `values` that starts and ends where theirs do (Ayer et al., 1955,
    https://doi.org/10.1214/aoms/1177728423). Time O(n).

    Args:
        values: Finite.

    Returns:
        As many.
    """
    sums: list[float] = []
    lengths: list[int] = []
    for value in values:
        total, length = value, 1
        # Levels stay apart only where the one behind is larger.
        while sums and sums[-1] * length >= total * lengths[-1]:
            total, length = total + sums.pop(), length + lengths.pop()
        sums.append(total)
        lengths.append(length)
    return [total / length for total, length in zip(sums, lengths, strict=True) for _ in range(length)]
