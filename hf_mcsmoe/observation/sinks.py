"""Tokens whose output dwarfs that of all others, such as those that attention sinks make."""

import dataclasses

import torch
from torch import Tensor

from .token_batches import RoutedTokens

# Energy of a token's target, relative to the median of those that have any: ten times the norm. Ordinary tokens are
# below; the outputs that make attention sinks are a hundred times as large as others in norm, ten thousand in energy.
MOST_ENERGY = 100.0


def with_bounded_sinks(batches: list[RoutedTokens]) -> list[RoutedTokens]:
    """The same tokens, those with a larger target than `MOST_ENERGY` weighed down to it.

    A least-squares fit counts a token by the energy of what it asks for, so a first token that every text shares can
    outweigh all others. Here gates and targets of such a token are multiplied with sqrt(most / energy), which is to
    count its squared error most / energy times. It keeps the direction that it asks for, and a voice.

    Where no token is that large the batches come back as they are. Doing it twice changes nothing more. Time O(T D).
    """
    if not batches or any(batch.targets is None for batch in batches):
        return batches
    energies = [batch.targets.float().square().sum(1) for batch in batches]
    together = torch.cat(energies)
    positive = together[together > 0]
    if not len(positive):
        return batches
    most = MOST_ENERGY * positive.median()
    # Rounding in the products must not make tokens that were weighed down before larger than `most`.
    if not (together > most * (1 + 1e-4)).any():
        return batches
    return [
        scaled(batch, (most / energy).sqrt().clamp(max=1)) for batch, energy in zip(batches, energies, strict=True)
    ]


def scaled(batch: RoutedTokens, scale: Tensor) -> RoutedTokens:
    """Tokens with features and targets multiplied with `scale` (t,)."""
    column = scale[:, None]
    dropped = None if batch.dropped_gates is None else batch.dropped_gates * column
    before = 1 if batch.scale is None else batch.scale
    return dataclasses.replace(
        batch,
        gates=batch.gates * column,
        targets=batch.targets * column,
        dropped_gates=dropped,
        scale=scale * before,
    )
