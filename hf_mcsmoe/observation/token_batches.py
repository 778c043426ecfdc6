"""Tokens with the weights of the experts that they go to, in the pieces that are handled at a time."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_TOKENS = 8192  # features of so many tokens are held at a time: T k I numbers


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """Tokens, the weights of the experts they go to, and what the layer should give for them."""

    hidden_states: Tensor  # (t, D)
    gates: Tensor  # (t, M): 0 where an expert does not see the token; slots of one expert are summed
    targets: Tensor | None  # (t, D); None where nobody asks
    dropped_gates: Tensor | None = None  # (t, R): of dropped slots that add constants; None where there are none
    scale: Tensor | None = None  # (t,): what gates and targets were multiplied with, and features beside them are

    def part(self, tokens: slice) -> "RoutedTokens":
        """Some of the tokens."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return RoutedTokens(*(None if value is None else value[tokens] for value in values))


def in_chunks(batches: Iterable[RoutedTokens]) -> Iterator[RoutedTokens]:
    """The same tokens in pieces of at most `CHUNK_TOKENS`: long batches are cut, short ones joined.

    Every piece costs a product for each pair of experts, however few tokens it has.
    """
    waiting, num_waiting = [], 0
    for batch in batches:
        for part in chunks(batch.gates.shape[0]):
            piece = batch.part(part)
            if num_waiting + len(piece.gates) > CHUNK_TOKENS:
                yield joined(waiting)
                waiting, num_waiting = [], 0
            waiting.append(piece)
            num_waiting += len(piece.gates)
    if waiting:
        yield joined(waiting)


def joined(pieces: list[RoutedTokens]) -> RoutedTokens:
    """Pieces one after another; one alone is not copied."""
    if len(pieces) == 1:
        return pieces[0]
    fields = [[getattr(piece, field.name) for piece in pieces] for field in dataclasses.fields(RoutedTokens)]
    return RoutedTokens(*(None if parts[0] is None else torch.cat(parts) for parts in fields))


def chunks(num_tokens: int) -> list[slice]:
    """The slices of at most `CHUNK_TOKENS` tokens that make up `num_tokens`."""
    return [slice(start, start + CHUNK_TOKENS) for start in range(0, num_tokens, CHUNK_TOKENS)]
