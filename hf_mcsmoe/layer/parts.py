"""Very wide experts in parts, so that what grows with the square of a width has a bound."""

import dataclasses
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..observation.token_batches import RoutedTokens

MOST_NEURONS = 16_384  # of a part: its Gram takes 2 GB


def in_parts(
    experts: PackedExperts, batches: Iterable[RoutedTokens], most: int = MOST_NEURONS
) -> tuple[PackedExperts, list[RoutedTokens]]:
    """The same layer with every expert of more than `most` neurons as several, which see the same tokens.

    The sum of the parts is the expert, whatever the gates; neurons keep their order, so what is computed for each of
    them, or for `down`, is that of the experts as they were. A bias after `down` stays with the first part.

    Args:
        experts: P neurons of M experts.
        batches: Tokens with gates (t, M).
        most: Neurons of a part at most; the parts of an expert differ by one neuron at most.

    Returns:
        Experts and batches; those that were given where no expert is that wide.
    """
    widths, batches = experts.widths.tolist(), list(batches)
    num_parts = [max(1, -(-width // most)) for width in widths]
    if sum(num_parts) == len(widths):
        return experts, batches
    offsets = [0]
    for (start, end), parts in zip(itertools.pairwise(experts.offsets.tolist()), num_parts, strict=True):
        offsets += [start + (end - start) * part // parts for part in range(1, parts + 1)]
    expert_of_part = torch.arange(len(widths)).repeat_interleave(torch.tensor(num_parts))
    split = dataclasses.replace(
        experts,
        offsets=torch.tensor(offsets, device=experts.offsets.device),
        down_bias=None if experts.down_bias is None else biases_of_parts(experts.down_bias, expert_of_part),
    )
    return split, [
        dataclasses.replace(batch, gates=batch.gates[:, expert_of_part.to(batch.gates.device)]) for batch in batches
    ]


def biases_of_parts(down_bias: Tensor, expert_of_part: Tensor) -> Tensor:
    """(parts, D): the bias of an expert for its first part, 0 for the others."""
    is_first = expert_of_part.diff(prepend=expert_of_part.new_full((1,), -1)) != 0
    place = expert_of_part.to(down_bias.device)
    return down_bias[place] * is_first.to(down_bias.device)[:, None]
