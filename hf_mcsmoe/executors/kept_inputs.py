"""In which order layers are compressed, and when the tokens that they are fitted on are collected."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..calibration import Calibration
from ..types import MoeLayer
from .in_memory import FIT_HELD_OUT_TOKENS, HELD_OUT_TOKENS, Collected, collect
from .wanted import Wanted

MOST_BYTES = 2**31  # of kept tokens, for all layers that are collected in one forward


def collect_first(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    tied: Mapping[MoeLayer, MoeLayer],
    data: Calibration,
    wanted: Wanted,
    progress: bool,
) -> dict[str, Collected]:
    """One forward over the calibration data: statistics of all layers, and their tokens if these fit in memory.

    Args:
        model: The original model.
        layers: The layers to compress.
        tied: Layers that share the experts of one of `layers`.
        data: What to run.
        wanted: What to collect.
        progress: Show a progress bar.
    """
    at_once = fits_at_once(layers, data, wanted)
    how = {"progress": progress, **amounts(wanted, keeps_tokens=at_once)}
    return collect(model, [*layers, *tied], data, wanted.statistics, **how)


def visits(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    tied: Mapping[MoeLayer, MoeLayer],
    data: Calibration,
    wanted: Wanted,
    collected: dict[str, Collected],
) -> Iterator[tuple[MoeLayer, Collected]]:
    """Each layer once, with what it is to be compressed on. Compress it before asking for the next one.

    A sequential recipe needs one forward for each layer, from the first to the last, through the layers that are
    compressed already, for statistics and tokens. Any other one needs what the original layers give: where the tokens
    of all layers do not fit in `MOST_BYTES`, layers are visited from the last to the first, in groups whose tokens do,
    because a layer's inputs depend only on those before it; one forward for each group.

    Args:
        model: In its present state.
        layers: As for `collect_first`.
        tied: As for `collect_first`.
        data: As for `collect_first`.
        wanted: As for `collect_first`.
        collected: From `collect_first`; emptied on the way.
    """
    groups = groups_of_layers(layers, data, wanted)
    if len(groups) == 1:
        for layer in layers:
            yield layer, collected.pop(layer.name)
        return
    how: dict[str, Any] = {"progress": False, **amounts(wanted, keeps_tokens=True)}
    needs = wanted.statistics if wanted.sequential else frozenset()
    for group in groups if wanted.sequential else reversed(groups):
        shared = [*group, *(other for other, first in tied.items() if first in group)]
        again = collect(model, shared, data, needs, **how)
        for layer in group:
            first, now = collected.pop(layer.name), again.pop(layer.name)
            yield layer, now if wanted.sequential else dataclasses.replace(now, statistics=first.statistics)


def amounts(wanted: Wanted, *, keeps_tokens: bool) -> dict[str, int]:
    """How many tokens a forward keeps of a layer, how many it gives to every expert, and the seed; for `collect`."""
    return {
        "seed": wanted.seed,
        "held_out_tokens": FIT_HELD_OUT_TOKENS if wanted.keeps_tokens else HELD_OUT_TOKENS,
        "calibration_tokens": wanted.fit_tokens if wanted.keeps_tokens and keeps_tokens else 0,
        "every_expert_tokens": wanted.every_expert_tokens,
    }


def fits_at_once(layers: list[MoeLayer], data: Calibration, wanted: Wanted) -> bool:
    """Whether one forward leaves all that is wanted of all layers."""
    return len(groups_of_layers(layers, data, wanted)) == 1


def groups_of_layers(layers: list[MoeLayer], data: Calibration, wanted: Wanted) -> list[list[MoeLayer]]:
    """Neighbouring layers whose tokens are collected together."""
    if wanted.sequential:
        return [[layer] for layer in layers]
    if not wanted.keeps_tokens:
        return [layers]
    tokens = min(wanted.fit_tokens, data.num_tokens) + FIT_HELD_OUT_TOKENS
    groups: list[list[MoeLayer]] = []
    room = 0
    for layer in layers:
        size = tokens * bytes_per_token(layer)
        if not groups or size > room:
            groups.append([])
            room = MOST_BYTES
        groups[-1].append(layer)
        room -= size
    return groups


def bytes_per_token(layer: MoeLayer) -> int:
    """What one kept token takes: hidden states for experts and router, slots and weights."""
    element = next(iter(layer.expert_parameters.values())).element_size()
    return 2 * layer.hidden_size * element + layer.top_k * (8 + element)
