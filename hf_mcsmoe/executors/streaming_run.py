"""One visit a decoder layer: read it, run it, compress it, write it, forget it."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..layer.compression import compress_layer
from ..modeling.merged_model import merged_class
from ..observation.layer_inputs import LayerInputs
from ..outcome import count
from ..pipeline import check_finite, leave_unreached, saliency_of
from ..recipe import Recipe
from ..saved_statistics import SavedStatistics
from ..types import LayerReport, LayerStatistics, MoeLayer
from .in_memory import Collected
from .journal import Journal
from .kept_inputs import correct_streams
from .output_shards import OutputShards
from .skeleton import tied_names
from .streaming_budgets import Budgets
from .streaming_model import StreamedModel
from .streaming_passes import Passes
from .streaming_statistics import StatisticsFiles
from .unit_check import UnitCheck
from .wanted import wanted_by


class StreamingRun:
    """The visits of all decoder layers, each done once, in this run or an earlier one.

    Memory: that of `StreamedModel`, and the layer at work once more as it becomes.

    Args:
        streamed: The model and its data.
        recipe: How its MoE layers are compressed.
        passes: What each pass does.
        journal: Of the working folder.
        progress: Show progress bars.

    Raises:
        ValueError: A shard that an earlier run wrote is gone.
    """

    def __init__(self, streamed: StreamedModel, recipe: Recipe, passes: Passes, journal: Journal, *, progress: bool):
        self.streamed, self.recipe, self.passes, self.journal = streamed, recipe, passes, journal
        self.progress, self.summary = progress, streamed.summary
        self.start = time.perf_counter() - journal.seconds
        model, self.stack = streamed.model, streamed.stack
        self.layers = [layer for found in streamed.layers_of.values() for layer in found]
        self.wanted = wanted_by(recipe)
        self.saved = streamed.data if isinstance(streamed.data, SavedStatistics) else None
        names = [layer.name for layer in self.layers]
        self.files = StatisticsFiles(journal.folder, names, streamed.device)
        if self.saved is not None:
            self.saved.devices = dict.fromkeys(names, streamed.device)
        original_format = recipe.layout == "native" or merged_class(type(model)).saves_original_format
        self.output = OutputShards(journal.folder / "model", len(self.stack) + 1, original_format)
        self.tied = tied_names(model)
        self.originally = [count(module) for module in self.stack.modules]
        self._check_written()

    def collect(self, description: str) -> None:
        """What budgets depend on, and with it all that can be kept for the second pass, layer by layer."""
        done = self.journal.done("statistics")
        if done and self.saved is None:
            self.streamed.restore(done[max(done)])
        for index in self._bar(range(self.streamed.last_moe + 1), description, done):
            with self.streamed.layer(index):
                collected = self._first_look(index)
                for layer in self.streamed.layers_of[index]:
                    of_layer = collected[layer.name]
                    is_reached = of_layer.statistics is not None
                    saliency = saliency_of(layer, self.recipe, of_layer.statistics) if is_reached else None
                    self.summary.bytes_written += self.files.write(layer.name, of_layer, saliency)
                self._record("statistics", index, self.streamed.record)

    def compress(self, description: str, budgets: Budgets) -> None:
        """Compress and write all layers."""
        done = self.journal.done("layer")
        if done and self.passes.runs_data_last:
            self.streamed.restore(done[max(done)])
        for index in self._bar(range(len(self.stack)), description, done):
            with self.streamed.layer(index):
                reports, layouts, recorded = [], {}, {}
                for layer, collected in self._visits(index):
                    if collected.statistics is None:
                        if self.recipe.layout == "native":
                            leave_unreached([layer], (), self.recipe)
                        continue
                    start = time.perf_counter()
                    how = (budgets.num_experts[layer.name], budgets.protected(layer))
                    report, layouts[layer.name], found = compress_layer(layer, self.recipe, collected, *how)
                    reports.append(asdict(report))
                    recorded |= found
                    self.summary.add_seconds("merge", start)
                start = time.perf_counter()
                save_file(recorded, self._record_file(index))
                written = self._write(index, self.streamed.tensors(index))
                self.summary.add_seconds("write", start)
                results = {"reports": reports, "layouts": layouts, "count": count(self.stack.modules[index])}
                self._record("layer", index, {**written, **self.streamed.record, **results})
                for layer in self.streamed.layers_of[index]:
                    self.files.forget(layer.name)

    def write_rest(self) -> None:
        """Write everything outside of the decoder layers."""
        if not self.journal.done("rest"):
            self.streamed.read_after_stack()
            tensors = {name: t for name, t in self.streamed.tensors_outside().items() if name not in self.tied}
            self._record("rest", len(self.stack), self._write(len(self.stack), tensors))
        self.streamed.close()

    def first_look(self, layer: MoeLayer) -> tuple[LayerStatistics | None, Tensor | None]:
        """(statistics, saliency) of a layer, after the first pass or from saved statistics; None if not reached."""
        if self.passes.has_first:
            statistics = self.files.statistics(layer.name)
            return statistics, None if statistics is None else self.files.saliency(layer.name)
        statistics = self.saved.statistics_of(layer.name)
        return statistics, None if statistics is None else saliency_of(layer, self.recipe, statistics)

    def results(self) -> tuple[list[LayerReport], dict[str, Any], dict[str, Tensor]]:
        """Reports, layouts and recorded statistics of all compressed layers, in the order of the model."""
        done = sorted(self.journal.done("layer").items())
        reports = [LayerReport(**report) for _, record in done for report in record["reports"]]
        layouts = {name: layout for _, record in done for name, layout in record["layouts"].items()}
        files = [load_file(self._record_file(index)) for index, _ in done]
        return reports, layouts, {name: tensor for file in files for name, tensor in file.items()}

    def written(self) -> list[dict[str, Any]]:
        """What was written, one record a shard."""
        return [record for record in self.journal.records if record["step"] in ("layer", "rest")]

    def count_after(self, before: tuple[int, int]) -> tuple[int, int]:
        """(parameters, bytes) of the result, when the original has `before`."""
        records = self.journal.done("layer").values()
        return tuple(
            total - sum(original[place] for original in self.originally) + sum(r["count"][place] for r in records)
            for place, total in enumerate(before)
        )

    def _check_written(self) -> None:
        for record in self.written():
            file = self.output.folder / record["file"]
            if not file.exists() or file.stat().st_size != record["bytes"]:
                raise ValueError(
                    f"{str(file)!r} was written by an earlier run, but is gone or was changed. "
                    f"Delete {str(self.journal.folder)!r} to start afresh."
                )

    def _first_look(self, index: int) -> dict[str, Collected]:
        layers = self.streamed.layers_of[index]
        self._check(index)
        if self.saved is not None:
            nothing = LayerInputs()
            return {x.name: Collected(self.saved.statistics_of(x.name), nothing, nothing) for x in layers}
        found = self.streamed.observe(index, layers, self.wanted, self.passes.first_needs, passes_on=True)
        if self.passes.runs_data_last:
            found = {name: dataclasses.replace(one, calibration=LayerInputs()) for name, one in found.items()}
        return found

    def _visits(self, index: int) -> Iterator[tuple[MoeLayer, Collected]]:
        """Each MoE layer of a decoder layer with what it is compressed on, to be done before the next is asked for."""
        layers, passes = self.streamed.layers_of[index], self.passes
        if not passes.has_first:
            self._check(index)
        if not passes.runs_data_last:
            for layer in layers:
                yield layer, self.saved[layer.name] if self.saved is not None else self.files.collected(layer.name)
        elif self.recipe.sequential:
            original = self._original_streams(index)
            for layer in layers:
                of_layer = self._observe(index, [layer], passes_on=False)[layer.name]
                if original:
                    correct_streams(of_layer, original.pop(layer.name))
                yield layer, of_layer
            if index < self.streamed.last_moe:
                self._observe(index, [], passes_on=True)
        elif index <= self.streamed.last_moe:
            collected = self._observe(index, layers, passes_on=True)
            for layer in layers:
                of_layer = collected.pop(layer.name)
                if passes.has_first:
                    of_layer = dataclasses.replace(of_layer, statistics=self.files.statistics(layer.name))
                yield layer, of_layer

    def _original_streams(self, index: int) -> dict[str, Collected]:
        """Where the recipe has targets, the residual stream after the MoE layers of a decoder layer, all as they were.

        Raises:
            UnfollowedStreamError: What experts give is changed before it is added to the stream.
        """
        if self.recipe.targets is None or index > self.streamed.last_moe:
            return {}
        layers, states = self.streamed.layers_of[index], self.streamed.original_states
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(UnitCheck(self.streamed.model, layer).attached())
            how = {"passes_on": True, "states": states, "keeps_inputs": False}
            return self.streamed.observe(index, layers, self.wanted, frozenset(), **how)

    def _observe(self, index: int, layers: list[MoeLayer], *, passes_on: bool) -> dict[str, Collected]:
        return self.streamed.observe(index, layers, self.wanted, self.passes.last_needs, passes_on=passes_on)

    def _check(self, index: int) -> None:
        """Refuse weights that are no numbers, or not those that statistics were saved of."""
        check_finite(self.streamed.layers_of[index])
        if self.saved is not None:
            for layer in self.streamed.layers_of[index]:
                self.saved.check_layer(layer)

    def _record_file(self, index: int) -> Path:
        """For what report and plots need of the statistics of a decoder layer."""
        return self.journal.folder / f"record-{index:05d}.safetensors"

    def _bar(self, indices: range, description: str, done: dict[int, Any]) -> Any:
        left = [index for index in indices if index not in done]
        self.summary.resumed_visits += len(done)
        return tqdm(left, description, total=len(indices), initial=len(done), unit="layer", disable=not self.progress)

    def _write(self, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        written = self.output.write(number, self.streamed.model, tensors)
        self.summary.bytes_written += written["bytes"]
        return written

    def _record(self, step: str, index: int, values: dict[str, Any]) -> None:
        seconds = time.perf_counter() - self.start
        self.journal.append({"step": step, "layer": index, "seconds": seconds, **values})
