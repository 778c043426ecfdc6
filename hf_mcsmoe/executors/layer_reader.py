"""Reading the weights of the next decoder layer in a thread while this one is computed."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .shards import Shards

Read = tuple[dict[str, Tensor], torch.cuda.Event | None]


class LayerReader:
    """Tensors from the shards as they are stored, on the device that computes; some of them read ahead.

    One thread reads. For a GPU the tensors are pinned and copied on a stream of their own, so that neither disk nor
    bus waits for the computation. Memory: what was asked for and not yet taken.

    Args:
        shards: Where the weights are.
        device: Where they are needed.
    """

    def __init__(self, shards: Shards, device: torch.device):
        self.shards, self.device = shards, device
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layer-reader")
        self.asked: tuple[list[str], Future[Read]] | None = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ask(self, names: Sequence[str]) -> None:
        """Begin to read some tensors; what was asked for before and not taken is forgotten."""
        if self.asked is not None:
            self.asked[1].cancel()
        self.asked = (list(names), self.thread.submit(self._read, list(names))) if names else None

    def take(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors, by name: those that were asked for, else read now.

        Raises:
            ValueError: A file changed since its header was read; also where that happened in the thread.
        """
        asked, self.asked = self.asked, None
        if asked is not None and asked[0] == list(names):
            tensors, copied = asked[1].result()
        else:
            tensors, copied = self._read(list(names))
        if copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(copied)
            for tensor in tensors.values():
                tensor.record_stream(here)  # its memory must not be reused by the other stream while it is in use
        return tensors

    def close(self) -> None:
        """End the thread."""
        self.asked = None
        self.thread.shutdown(cancel_futures=True)

    def _read(self, names: list[str]) -> Read:
        tensors = self.shards.read(names)
        if self.stream is None:
            return tensors, None
        with torch.cuda.stream(self.stream):
            moved = {name: t.pin_memory().to(self.device, non_blocking=True) for name, t in tensors.items()}
            copied = torch.cuda.Event()
            copied.record(self.stream)
        copied.synchronize()  # the thread waits, so that the pinned memory is there until it was copied
        return moved, copied
