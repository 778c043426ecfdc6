"""What several processes collected becomes what one would have; layers that they compressed become those of all."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modeling.offload import execution_device
from ..modeling.transfer import adopt_layer, tensors_of_layer
from ..observation.layer_inputs import LayerInputs
from ..statistics import STATISTICS
from ..types import LayerReport, MoeLayer
from .observer import LayerObserver
from .processes import Processes, kind_of

Result = tuple[LayerReport, dict[str, Any], dict[str, Tensor]]  # of `compress_layer`
PARTS = ("held_out", "calibration")
FIELDS = ("experts_inputs", "router_calls", "streams", "outputs")


@dataclass(frozen=True)
class Sent:
    """Stands for a tensor that is sent beside what holds it."""

    dtype: str
    shape: tuple[int, ...]
    on_cpu: bool


class BatchOrder:
    """Which batch each kept input of each observer came from, so that they can be put in the order of the batches."""

    def __init__(self, observers: Sequence[LayerObserver]):
        self.observers = observers
        self.positions: list[dict[tuple[str, str], list[int]]] = [
            {(part, name): [] for part in PARTS for name in FIELDS} for _ in observers
        ]

    def note(self, position: int) -> None:
        """The batch at `position` was run; what was kept since the last note is of it."""
        for observer, positions in zip(self.observers, self.positions, strict=True):
            for (part, name), noted in positions.items():
                noted += [position] * (len(getattr(getattr(observer, part), name)) - len(noted))

    def share(self, processes: Processes) -> None:
        """Leave every observer with the sums of all processes, and that of the layer's owner with what they kept.

        The others keep nothing of what the layer was given. What was kept is in the order of the batches.
        """
        if processes.is_alone:
            return
        add_up(self.observers, processes)
        mine, tensors = [], []
        for observer, positions in zip(self.observers, self.positions, strict=True):
            tensors.append([])
            mine.append(
                [
                    (part, name, position, without_tensors(value, tensors[-1]))
                    for (part, name), noted in positions.items()
                    for position, value in zip(noted, getattr(getattr(observer, part), name), strict=True)
                ]
            )
            observer.held_out, observer.calibration = LayerInputs(), LayerInputs()
        of_rank = processes.gather(mine)
        owned = {}
        for place, observer in enumerate(self.observers):
            kinds = [[(one.dtype, one.shape) for one in sent_in(described[place])] for described in of_rank]
            given = to_owner(tensors[place], kinds, processes.owner(observer.layer.name), processes)
            tensors[place] = []
            if given is not None:
                owned[place] = given
        for place, given in owned.items():
            observer, entries = self.observers[place], []
            device = execution_device(observer.layer.experts)
            for described, found in zip(of_rank, given, strict=True):
                values = iter(found)
                entries += [(*entry[:3], with_tensors(entry[3], values, device)) for entry in described[place]]
            for part, name, _, value in sorted(entries, key=lambda entry: entry[2]):  # stable within a batch
                getattr(getattr(observer, part), name).append(value)


def to_owner(
    tensors: list[Tensor], kinds: list[list[tuple[str, tuple[int, ...]]]], owner: int, processes: Processes
) -> list[list[Tensor]] | None:
    """The tensors that each process has for a layer, by rank, in its owner; None in the others."""
    if processes.rank != owner:
        processes.send(tensors, owner)
        return None
    return [tensors if rank == owner else processes.receive(kinds[rank], rank) for rank in range(processes.count)]


def add_up(observers: Sequence[LayerObserver], processes: Processes) -> None:
    """Sums (or maxima) over all processes in every accumulator; one that saw no batch has nothing to add."""
    mine = [{name: kind_of(value) for name, value in o.accumulator.sums.items()} for o in observers]
    of_rank = processes.gather(mine)
    for place, observer in enumerate(observers):
        kinds = {name: kind for described in of_rank for name, kind in described[place].items()}
        sums, device = observer.accumulator.sums, execution_device(observer.layer.experts)
        for name, (dtype, shape) in sorted(kinds.items()):
            is_maximum = name in STATISTICS and STATISTICS.trait(name, "combine") == "max"
            nothing = -torch.inf if is_maximum else 0
            value = sums.get(name)
            if value is None:
                value = torch.full(shape, nothing, dtype=getattr(torch, dtype), device=device)
            sums[name] = processes.maximum_of_all(value) if is_maximum else processes.sum_of_all(value)


def without_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """`value`, made of plain containers, with its tensors replaced and appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return Sent(*kind_of(value), value.device.type == "cpu")
    if isinstance(value, tuple | list):
        return type(value)(without_tensors(item, tensors) for item in value)
    if isinstance(value, dict):
        return {name: without_tensors(item, tensors) for name, item in value.items()}
    return value


def with_tensors(value: Any, tensors: Iterator[Tensor], device: torch.device) -> Any:
    """The inverse of `without_tensors`; tensors go to `device` unless they were on the CPU."""
    if isinstance(value, Sent):
        tensor = next(tensors)
        return tensor if value.on_cpu else tensor.to(device)
    if isinstance(value, tuple | list):
        return type(value)(with_tensors(item, tensors, device) for item in value)
    if isinstance(value, dict):
        return {name: with_tensors(item, tensors, device) for name, item in value.items()}
    return value


def sent_in(value: Any) -> Iterator[Sent]:
    """What stands for tensors in `value`, in their order."""
    if isinstance(value, Sent):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from sent_in(item)


def compress_shared(
    todo: Iterable[tuple[MoeLayer, Any]],
    compress: Callable[[MoeLayer, Any], Result],
    processes: Processes,
    *,
    one_by_one: bool,
    is_native: bool,
) -> Iterator[tuple[MoeLayer, Result]]:
    """Every layer with what compressing it gave, each compressed by its owner and in the models of all afterwards.

    Args:
        todo: Layers and what they are compressed on.
        compress: Compresses a layer in place.
        processes: Who shares the layers.
        one_by_one: The next of `todo` needs the layer before it to be compressed everywhere; else results are
            exchanged at the end.
        is_native: The layout.
    """
    results: dict[str, Result] = {}
    waiting: list[MoeLayer] = []
    for layer, of_layer in todo:
        if processes.owns(layer.name):
            results[layer.name] = compress(layer, of_layer)
        waiting.append(layer)
        if processes.is_alone or one_by_one:
            yield from exchange(waiting, results, processes, is_native)
            waiting = []
    yield from exchange(waiting, results, processes, is_native)


def exchange(
    layers: Sequence[MoeLayer], results: dict[str, Result], processes: Processes, is_native: bool
) -> Iterator[tuple[MoeLayer, Result]]:
    """Each layer with its result, after it was taken over from its owner."""
    if processes.is_alone:
        yield from ((layer, results.pop(layer.name)) for layer in layers)
        return
    for layer in layers:
        owner = processes.owner(layer.name)
        mine: tuple | None = None
        tensors: list[Tensor] = []
        if processes.rank == owner:
            report, layout, recorded = results.pop(layer.name)
            changed = tensors_of_layer(layer)
            tensors = [*changed.values(), *recorded.values()]
            mine = report, layout, list(changed), list(recorded), [kind_of(tensor) for tensor in tensors]
        report, layout, names, names_of_record, kinds = processes.gather(mine)[owner]
        if processes.rank != owner:
            tensors = [torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in kinds]
        tensors = processes.spread(tensors, owner)
        if processes.rank != owner:
            adopt_layer(layer, report, layout, dict(zip(names, tensors, strict=False)), is_native=is_native)
        yield layer, (report, layout, dict(zip(names_of_record, tensors[len(names) :], strict=True)))
