"""In which order layers are compressed, and when the tokens that they are fitted on are collected."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..calibration import Calibration
from ..observation.layer_inputs import LayerInputs
from ..statistics import STATISTICS
from ..types import MoeLayer
from .in_memory import FIT_HELD_OUT_TOKENS, HELD_OUT_TOKENS, Collected, collect
from .part_of_forward import ContinuedForwards, continued_forwards, forward_until
from .shards import NotStreamableError
from .unit_check import check_units
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

    With `wanted.targets` no tokens, but the residual stream after each layer for them: D numbers a token and layer.

    Args:
        model: The original model.
        layers: The layers to compress.
        tied: Layers that share the experts of one of `layers`.
        data: What to run.
        wanted: What to collect.
        progress: Show a progress bar.
    """
    watched, how = [*layers, *tied], {"progress": progress}
    if wanted.targets is not None:
        check_units(model, watched, data)
        how |= {"keeps_streams": True, "keeps_inputs": False, **amounts(wanted, keeps_tokens=True)}
    else:
        how |= amounts(wanted, keeps_tokens=fits_at_once(layers, data, wanted))
    return collect(model, watched, data, wanted.statistics, **how)


def visits(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    tied: Mapping[MoeLayer, MoeLayer],
    data: Calibration,
    wanted: Wanted,
    collected: dict[str, Collected],
) -> Iterator[tuple[MoeLayer, Collected]]:
    """Each layer once, with what it is to be compressed on. Compress it before asking for the next one.

    A sequential recipe needs, for each layer from the first to the last, the part of a forward that runs the layer
    before it, compressed by then, and the layer itself, for statistics and tokens; in models that cannot begin in
    between, all layers up to it. With `wanted.targets` its tokens come with the `corrections` that bring their
    residual stream back to what `collect_first` kept of the original one.

    Any other one needs what the original layers give: where the tokens of all layers do not fit in `MOST_BYTES`,
    layers are visited from the last to the first, in groups whose tokens do, because a layer's inputs depend only on
    those before it; one forward for each group.

    Args:
        model: In its present state.
        layers: As for `collect_first`.
        tied: As for `collect_first`.
        data: As for `collect_first`.
        wanted: As for `collect_first`.
        collected: From `collect_first`; emptied on the way.
    """
    groups = groups_of_layers(layers, data, wanted)
    if len(groups) == 1 and wanted.targets is None:
        for layer in layers:
            yield layer, collected.pop(layer.name)
        return
    how: dict[str, Any] = {"progress": False, **amounts(wanted, keeps_tokens=True)}
    how["keeps_streams"] = wanted.targets is not None
    needs = wanted.statistics if wanted.sequential else frozenset()
    # A backward needs the whole model.
    goes_on = wanted.sequential and not any(STATISTICS.trait(name, "gradients", False) for name in needs)
    forwards = continued_forwards(model, [*layers, *tied]) if goes_on else None
    for group in groups if wanted.sequential else reversed(groups):
        shared = [*group, *(other for other, first in tied.items() if first in group)]
        again, forwards = collect_part(model, shared, data, needs, forwards, how)
        for layer in group:
            first, now = collected.pop(layer.name), again.pop(layer.name)
            if wanted.targets is not None:
                correct_streams(now, first)
            yield layer, now if wanted.sequential else dataclasses.replace(now, statistics=first.statistics)


def collect_part(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    data: Calibration,
    needs: frozenset[str],
    forwards: ContinuedForwards | None,
    how: dict[str, Any],
) -> tuple[dict[str, Collected], ContinuedForwards | None]:
    """What a forward up to some layers leaves of them, and `forwards` if the next one may go on from there."""
    if forwards is not None:
        try:
            with forwards.until(layers) as forward:
                return collect(model, layers, data, needs, forward=forward, **how), forwards
        except NotStreamableError:
            pass  # nothing of this forward is kept
    return collect(model, layers, data, needs, forward=forward_until(model, layers), **how), None


def original_visits(
    model: PreTrainedModel, layers: list[MoeLayer], data: Calibration, wanted: Wanted, collected: dict[str, Collected]
) -> Iterator[tuple[MoeLayer, Collected]]:
    """Each layer with what it is given while all layers are as they were, for what looks at all of them beforehand.

    Where `collect_first` kept the tokens of all layers, those; else one forward for each group of layers whose tokens
    fit in `MOST_BYTES`. `collected` stays as it is.

    Args:
        model: The original model.
        layers: As for `collect_first`; none of them shares its experts.
        data: As for `collect_first`.
        wanted: As for `collect_first`, with kept tokens.
        collected: From `collect_first`.
    """
    if wanted.targets is None and fits_at_once(layers, data, wanted):
        yield from ((layer, collected[layer.name]) for layer in layers)
        return
    how = {"progress": False, **amounts(wanted, keeps_tokens=True)}
    for group in groups_of_layers(layers, data, dataclasses.replace(wanted, sequential=False)):
        found = collect(model, group, data, frozenset(), **how)
        yield from ((layer, found.pop(layer.name)) for layer in group)


def correct_streams(now: Collected, original: Collected) -> None:
    """Give all kept tokens of a layer the corrections that bring their residual stream to the original one."""
    correct(now.calibration, original.calibration)
    correct(now.held_out, original.held_out)


def correct(now: LayerInputs, original: LayerInputs) -> None:
    """Give kept tokens the corrections that bring their residual stream to the original one; drops both streams."""
    pairs = zip(original.streams, now.streams, strict=True)
    now.corrections = [before.to(after.device).float() - after.float() for before, after in pairs]
    now.streams = original.streams = []


def amounts(wanted: Wanted, *, keeps_tokens: bool) -> dict[str, int]:
    """How many tokens a forward keeps, gives to every expert and runs backward, and the seed; for `collect`."""
    return {
        "seed": wanted.seed,
        "held_out_tokens": FIT_HELD_OUT_TOKENS if wanted.keeps_tokens else HELD_OUT_TOKENS,
        "calibration_tokens": wanted.fit_tokens if wanted.keeps_tokens and keeps_tokens else 0,
        "every_expert_tokens": wanted.every_expert_tokens,
        "gradient_tokens": wanted.gradient_tokens,
        "keeps_outputs": wanted.outputs and keeps_tokens,
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
        size = tokens * bytes_per_token(layer, wanted)
        if not groups or size > room:
            groups.append([])
            room = MOST_BYTES
        groups[-1].append(layer)
        room -= size
    return groups


def bytes_per_token(layer: MoeLayer, wanted: Wanted) -> int:
    """What one kept token takes: hidden states for experts and router, slots and weights, outputs where wanted."""
    element = next(iter(layer.expert_parameters.values())).element_size()
    return (3 if wanted.outputs else 2) * layer.hidden_size * element + layer.top_k * (8 + element)
