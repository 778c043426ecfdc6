"""Several processes that work on one model together, through torch.distributed: who they are, and how they talk."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
Error = TypeVar("Error", bound=BaseException)
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of torchrun and accelerate launch
# What is wrong with the input; callers tell these from failures of the program.
SPOKEN = {"ValueError": ValueError, "TypeError": TypeError, "OSError": OSError, "ImportError": ImportError}
LONGEST_WAIT = timedelta(days=30)  # one process may merge layers for hours while the others have nothing left to do


class Processes:
    """The processes of one run, seen from one of them.

    Every method that talks is called by all of them, in the same order. Before tensors are exchanged they `gather`:
    a process that failed says so there, see `FailingTogether`.

    Args:
        rank: Of this process, from 0.
        count: How many there are.
        group: For messages and tensors on the CPU; None for a process alone.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None):
        self.rank, self.count, self.group = rank, count, group
        self.owner_of_layer: dict[str, int] = {}

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to share with."""
        return self.count == 1

    def takes(self, position: int) -> bool:
        """Whether this process runs the calibration batch at `position`: each batch has one process."""
        return position % self.count == self.rank

    def share_layers(self, layers: Sequence[str], tied: dict[str, str]) -> None:
        """Give every layer a process that compresses it, in turn.

        Args:
            layers: Names of the layers.
            tied: Layers that share the experts of another one, by name, and that one.
        """
        self.owner_of_layer = {layer: place % self.count for place, layer in enumerate(layers)}
        self.owner_of_layer |= {layer: self.owner_of_layer[first] for layer, first in tied.items()}

    def owner(self, layer: str) -> int:
        """The rank of the process that gets the kept tokens of a layer; the first one's unless layers are shared."""
        return self.owner_of_layer.get(layer, 0)

    def owns(self, layer: str) -> bool:
        """Whether this process gets the kept tokens of a layer, and compresses it."""
        return self.owner(layer) == self.rank

    def gather(self, value: Value) -> list[Value]:
        """What each process has, plain containers and numbers, by rank.

        Raises:
            ValueError: Another process failed with one; so with the other `SPOKEN` errors.
            RuntimeError: Another process failed with anything else.
        """
        return [value] if self.is_alone else self._exchange(value, None)

    def agree(self) -> None:
        """Wait until all processes are here; raises as `gather` does."""
        self.gather(None)

    def announce(self, error: BaseException) -> None:
        """Tell the others, where they next gather something, that they wait in vain."""
        if not self.is_alone:
            self._exchange(None, error)

    def _exchange(self, value: Value, error: BaseException | None) -> list[Value]:
        told = None
        if error is not None:
            kind = next((name for name, one in SPOKEN.items() if isinstance(error, one)), None)
            told = kind, f"{type(error).__name__}: {error}"
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, (told, value), group=self.group)
        for rank, (failure, _) in enumerate(found):
            if failure is not None and error is None:
                kind = SPOKEN.get(failure[0], RuntimeError)
                raise note_known(kind(f"Process {rank} of {self.count} failed with {failure[1]}"))
        return [value for _, value in found]

    def from_first(self, value: Value) -> Value:
        """What the first process has, in all of them: decisions that must not differ by rounding."""
        return self.gather(value)[0]

    def check_same(self, what: dict[str, Any]) -> None:
        """Refuse processes that were asked for different things.

        Args:
            what: Plain values by what they are, for the message.

        Raises:
            ValueError: One differs between two processes.
        """
        for rank, other in enumerate(self.gather(what)):
            differing = [name for name, value in what.items() if other[name] != value]
            if differing:
                raise note_known(
                    ValueError(
                        f"Process {rank} of {self.count} was given another {' and '.join(differing)} than process "
                        f"{self.rank}. Call with the same arguments in all processes; a stream must give the same "
                        "rows everywhere."
                    )
                )

    def sum_of_all(self, value: Tensor) -> Tensor:
        """Sum over the processes; `value` is used up."""
        value = value.contiguous()
        dist.all_reduce(value, group=self._group_of(value))
        return value

    def maximum_of_all(self, value: Tensor) -> Tensor:
        """Largest over the processes, entry by entry; NaN where one is."""
        mine = value.cpu().contiguous()
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine, group=self.group)
        return torch.stack(found).amax(0).to(value.device)

    def send(self, tensors: Sequence[Tensor], to: int) -> None:
        """Give tensors of any dtype and device to one process, which calls `receive`."""
        for packed in as_bytes(tensors):
            dist.send(packed, group=self.group, group_dst=to)

    def receive(self, like: Sequence[tuple[str, tuple[int, ...]]], sender: int) -> list[Tensor]:
        """What one process sends, on the CPU: tensors of dtypes and shapes."""
        found = [torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in like]
        for packed in as_bytes(found):
            dist.recv(packed, group=self.group, group_src=sender)
        return found

    def spread(self, tensors: Sequence[Tensor], sender: int) -> list[Tensor]:
        """The tensors of one process, in all of them, on the CPU; the others give empty ones of the same kind."""
        for packed in as_bytes(tensors):
            dist.broadcast(packed, group=self.group, group_src=sender)
        return list(tensors)

    def _group_of(self, value: Tensor) -> Any:
        return self.group if value.device.type == "cpu" else None  # None: the group that the launcher's backend made


def as_bytes(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each tensor that is not empty as bytes on the CPU; without a copy where it is contiguous there."""
    for tensor in tensors:
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def kind_of(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape as plain values."""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


class FailingTogether:
    """A block of work in which no process waits for one that has failed: all of them leave it with an error.

    Whoever fails says so where the others next gather something, at the latest at the end of the block.
    """

    def __init__(self, processes: Processes):
        self.processes = processes

    def __enter__(self) -> Processes:
        return self.processes

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.processes.agree()
        elif not getattr(error, "is_known_to_all_processes", False):
            self.processes.announce(note_known(error))


def note_known(error: Error) -> Error:
    """Mark an error that every process raises, so that it is not announced again."""
    error.is_known_to_all_processes = True
    return error


ALONE = Processes()
_CURRENT: ContextVar[Processes] = ContextVar("processes", default=ALONE)


def current() -> Processes:
    """The processes that work together now: more than one only within `working_together`."""
    return _CURRENT.get()


@contextmanager
def working_together() -> Iterator[Processes]:
    """Within the context the processes that a launcher started share the work, and fail together.

    They are those of the default group of torch.distributed, or where there is none those that the variables of
    `torchrun` and `accelerate launch` name: the group is then made (NCCL where there is a GPU, else gloo) and
    destroyed at the end. Within another such context it is that one's. All of them must enter it.

    Raises:
        ValueError: The launcher started another number of processes than the group has.
    """
    if not _CURRENT.get().is_alone:
        yield _CURRENT.get()
        return
    made = join_launched()
    processes = ALONE
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        check_world_size()
        group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        processes = Processes(dist.get_rank(), dist.get_world_size(), group)
    token = _CURRENT.set(processes)
    try:
        with FailingTogether(processes):
            yield processes
    finally:
        _CURRENT.reset(token)
        if processes.group is not None:
            dist.destroy_process_group(processes.group)
        if made:
            dist.destroy_process_group()


def in_all_processes(function: Callable[..., Value]) -> Callable[..., Value]:
    """The function, run within `working_together`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Value:
        with working_together():
            return function(*args, **kwargs)

    return run


def join_launched() -> bool:
    """Make the default group where a launcher started several processes and nobody did; whether that was done."""
    is_launched = all(os.environ.get(name) for name in LAUNCHER_VARIABLES)
    if not is_launched or int(os.environ["WORLD_SIZE"]) == 1 or not dist.is_available() or dist.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


def check_world_size() -> None:
    """Raise ValueError where the group of torch.distributed is not what the launcher started."""
    launched = os.environ.get("WORLD_SIZE")
    if launched is not None and int(launched) != dist.get_world_size():
        raise ValueError(
            f"WORLD_SIZE is {launched}, but the group of torch.distributed has {dist.get_world_size()} processes. "
            "Call init_process_group in all of them, or leave it to hf_mcsmoe."
        )


def device_map_of(processes: Processes, device_map: Any) -> Any:
    """The device map of one of several processes: "auto" is a GPU of its own, where there are GPUs."""
    if processes.is_alone or device_map != "auto" or not torch.cuda.is_available():
        return device_map
    return {"": torch.cuda.current_device()}
