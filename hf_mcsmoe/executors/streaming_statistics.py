"""What the first of two passes leaves in the working folder: statistics, tokens and saliency of each MoE layer."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..saved_statistics import file_of, read_layer, read_statistics, write_layer
from ..types import LayerStatistics
from .in_memory import Collected


class StatisticsFiles:
    """Files of the MoE layers, to be read once more and deleted.

    Args:
        folder: The working folder of a run.
        layers: Names of all MoE layers of the run, in order.
        device: Where kept tokens go when they are read.
    """

    def __init__(self, folder: Path, layers: list[str], device: torch.device):
        self.folder, self.layers, self.device = folder, layers, device

    def write(self, layer: str, collected: Collected, saliency: Tensor | None) -> int:
        """Write what a forward left of a layer and its saliency (N,), None where no token reached it.

        Returns:
            Bytes written.
        """
        place = self.layers.index(layer)
        entry = write_layer(self.folder, place, collected)
        if saliency is not None:
            save_file({"saliency": saliency.cpu().contiguous()}, self.folder / file_of("saliency", place))
        self._entry_file(place).write_text(json.dumps(entry), encoding="utf-8")
        return sum(file.stat().st_size for file in self._files(place))

    def collected(self, layer: str) -> Collected:
        """All that was written of a layer but its saliency."""
        place = self.layers.index(layer)
        return read_layer(self.folder, place, self._entry(place), self.device)

    def statistics(self, layer: str) -> LayerStatistics | None:
        """Of a layer, without tokens; None if no token reached it."""
        place = self.layers.index(layer)
        return read_statistics(self.folder, place, self._entry(place))

    def saliency(self, layer: str) -> Tensor:
        """Of the experts of a layer that a token reached, (N,)."""
        return load_file(self.folder / file_of("saliency", self.layers.index(layer)))["saliency"]

    def forget(self, layer: str) -> None:
        """Delete the files of a layer."""
        for file in self._files(self.layers.index(layer)):
            file.unlink()

    def _entry(self, place: int) -> dict[str, Any]:
        return json.loads(self._entry_file(place).read_text(encoding="utf-8"))

    def _entry_file(self, place: int) -> Path:
        return self.folder / f"layer-{place:05d}.json"

    def _files(self, place: int) -> list[Path]:
        return list(self.folder.glob(f"layer-{place:05d}.*"))
