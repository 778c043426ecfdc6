"""The calibration hidden states on their way through the layers: in a file for resuming, in RAM where they fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class HiddenStates:
    """Output of the last decoder layer for each calibration batch, (B, S, D) each.

    They are always written to a file, from which a killed run goes on; while they take at most `in_memory_bytes`
    they are kept in RAM as well and the file is not read. Memory: that, or one batch.

    Args:
        folder: For the files: that of the last finished layer, and that of the layer at work.
        in_memory_bytes: Most bytes to keep in RAM.
        name: What their files begin with.
    """

    def __init__(self, folder: Path, in_memory_bytes: int, name: str = "hidden_states"):
        self.folder, self.name = folder, name
        self.in_memory_bytes = in_memory_bytes
        self.bytes_written = 0
        self._record: dict[str, Any] | None = None
        self._kept: dict[int, Tensor] = {}

    def restore(self, record: dict[str, Any] | None) -> None:
        """Go on from what `written` gave in an earlier run."""
        self._record = record
        self._kept = {}

    def take(self, position: int) -> Tensor:
        """The hidden states of one batch, for the last time: in RAM they are given away."""
        return self._kept.pop(position) if position in self._kept else self.read(position)

    def read(self, position: int) -> Tensor:
        """The hidden states of one batch; do not write into them."""
        if position in self._kept:
            return self._kept[position]
        shapes, dtype = self._record["shapes"], getattr(torch, self._record["dtype"])
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape in shapes]
        file = self.folder / self._record["file"]
        flat = np.memmap(file, np.uint8, "c", offset=sum(sizes[:position]), shape=(sizes[position],))
        return torch.from_numpy(flat).clone().view(dtype).reshape(shapes[position])

    @contextmanager
    def written(self, layer: int) -> Iterator["HiddenStatesWriter"]:
        """Take the outputs of one decoder layer, batch by batch; they replace the former ones at the end."""
        writer = HiddenStatesWriter(self.folder / f"{self.name}-{layer:05d}.bin", self.in_memory_bytes)
        with open(writer.path, "wb") as file:
            writer.file = file
            yield writer
        self.bytes_written += writer.num_bytes
        self._record, self._kept = writer.record(), writer.kept

    @property
    def record(self) -> dict[str, Any] | None:
        """What `restore` needs, as JSON."""
        return self._record

    def clean(self) -> None:
        """Delete the files that no later step reads."""
        current = self._record["file"] if self._record else None
        for file in self.folder.glob(f"{self.name}-*.bin"):
            if file.name != current:
                file.unlink()


class HiddenStatesWriter:
    """The file of one layer while it is written."""

    def __init__(self, path: Path, in_memory_bytes: int):
        self.path = path
        self.file: Any = None
        self.in_memory_bytes = in_memory_bytes
        self.num_bytes = 0
        self.shapes: list[list[int]] = []
        self.dtype = ""
        self.kept: dict[int, Tensor] = {}

    def append(self, hidden_states: Tensor) -> None:
        """Add the output for the next batch, on any device."""
        hidden_states = hidden_states.detach().cpu().contiguous()
        self.file.write(memoryview(hidden_states.view(-1).view(torch.uint8).numpy()))
        self.num_bytes += hidden_states.numel() * hidden_states.element_size()
        if self.num_bytes <= self.in_memory_bytes:
            self.kept[len(self.shapes)] = hidden_states
        self.shapes.append(list(hidden_states.shape))
        self.dtype = str(hidden_states.dtype).removeprefix("torch.")

    def record(self) -> dict[str, Any]:
        """Name, shapes and dtype of what was written."""
        return {"file": self.path.name, "shapes": self.shapes, "dtype": self.dtype}
