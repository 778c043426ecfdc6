"""Rows of tokens sorted by expert, and the sum of what experts gave back: shared by the forms' implementations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """The S = T k routed slots of a call sorted by expert, skipped ones (index M) last."""

    place: Tensor  # (S,) int64: slot of the call that a sorted row is, counted choice by choice: j T + t
    token: Tensor  # (S,) int64: its token
    weight: Tensor  # (S,): its weight
    counts: list[int]  # rows of each of the M experts; their sum is less than S where slots are skipped

    def of_experts(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, ascending, and which."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


def sort_rows(index: Tensor, weights: Tensor, num_experts: int) -> RoutedRows:
    """Sort the routed slots of a call by expert.

    Within an expert the first choices of all tokens come first, as in the eager experts of transformers, so that
    sums have the same order. Reads the counts on the host: one synchronisation with a GPU, as there.

    Args:
        index: Expert of each slot, (T, k) int64 in [0, M]; M is skipped.
        weights: (T, k).
        num_experts: M.
    """
    experts, place = index.T.flatten().sort(stable=True)
    counts = experts.bincount(minlength=num_experts + 1)[:num_experts].tolist()
    return RoutedRows(place, place % len(index), weights.T.flatten()[place], counts)


def add_by_expert(run_expert: Callable[[int, Tensor], Tensor], inputs: Tensor, rows: RoutedRows, width: int) -> Tensor:
    """Run each expert on its tokens and add its weighted output at once: the eager implementation.

    Args:
        run_expert: (expert, inputs (S_e, F)) -> outputs (S_e, width).
        inputs: Of all tokens, (T, F).
        rows: From `sort_rows`.
        width: Of the outputs.

    Returns:
        (T, width) in the dtype of the inputs, summed in it, experts in ascending order.
    """
    output = inputs.new_zeros(len(inputs), width)
    for expert, part in rows.of_experts():
        token = rows.token[part]
        weighted = run_expert(expert, inputs[token]) * rows.weight[part, None]
        output.index_add_(0, token, weighted.to(output.dtype))
    return output


def run_sorted(run_expert: Callable[[int, Tensor], Tensor], inputs: Tensor, rows: RoutedRows, width: int) -> Tensor:
    """Run each expert on its slice of sorted rows, then sum over each token's choices.

    Args:
        run_expert: (expert, inputs (S_e, F)) -> outputs (S_e, width).
        inputs: Of all tokens, (T, F).
        rows: From `sort_rows`.
        width: Of the outputs.

    Returns:
        (T, width) in the dtype of the inputs, summed choice after choice in the dtype of the weighted outputs.
        Deterministic: no place is written twice.
    """
    by_place = None
    for expert, part in rows.of_experts():
        weighted = run_expert(expert, inputs[rows.token[part]]) * rows.weight[part, None]
        if by_place is None:
            by_place = weighted.new_zeros(len(rows.place), width)
        by_place.index_add_(0, rows.place[part], weighted)
    if by_place is None:  # all slots are skipped
        return inputs.new_zeros(len(inputs), width)
    return by_place.view(-1, len(inputs), width).sum(0).to(inputs.dtype)


def run_by_slot(
    run_rows: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    index: Tensor,
    weights: Tensor,
    num_experts: int,
) -> Tensor:
    """Run each routed slot with matrices gathered for it: the batched implementation, without a synchronisation.

    Args:
        run_rows: (inputs (S, F), expert of each (S,) in [0, M)) -> outputs (S, width).
        inputs: Of all tokens, (T, F).
        index: (T, k) int64 in [0, M]; slots of M, whose weight is 0, are computed for expert M - 1.
        weights: (T, k).
        num_experts: M.

    Returns:
        (T, width) in the dtype of the inputs, summed choice after choice in the dtype of the weighted outputs.
    """
    top_k = index.shape[1]
    flat = index.flatten()
    outputs = run_rows(inputs.repeat_interleave(top_k, dim=0), flat.clamp(max=num_experts - 1))
    weighted = outputs * weights.flatten()[:, None]
    return weighted.view(len(index), top_k, -1).sum(1).to(inputs.dtype)
