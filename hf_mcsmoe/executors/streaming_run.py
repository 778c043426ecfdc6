"""One visit a decoder layer: read it, run it, compress it, write it, forget it."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..layer.compression import compress_layer
from ..modeling.merged_model import merged_class
from ..observation.layer_inputs import LayerInputs, TensorOfBlock
from ..outcome import count
from ..pipeline import check_finite, saliency_of
from ..recipe import Recipe
from ..types import LayerReport, LayerStatistics, MoeLayer
from .decoder_stack import DecoderStack
from .hidden_states import HiddenStates
from .in_memory import Collected, collect
from .journal import Journal
from .kept_inputs import amounts
from .output_shards import OutputShards
from .shards import Shards
from .skeleton import load_tensors, release, stored_tensors, tied_names
from .wanted import wanted_by


@dataclass
class StreamingSummary:
    """What a streaming run cost, beside the report."""

    passes: int  # over the original weights
    device: str
    num_decoder_layers: int
    resumed_visits: int = 0  # visits of layers that an earlier run had done
    bytes_read: int = 0
    bytes_written: int = 0
    seconds_of_step: dict[str, float] = field(default_factory=dict)  # "read", "forward", "merge", "write"

    def add_seconds(self, step: str, start: float) -> float:
        """Count the time since `start` for `step`; returns the time now."""
        now = time.perf_counter()
        self.seconds_of_step[step] = self.seconds_of_step.get(step, 0.0) + now - start
        return now


class StreamingRun:
    """The visits of all decoder layers, each done once, in this run or an earlier one.

    Memory: one decoder layer as it is stored, the same layer as it becomes, and while it is fused from experts stored
    one by one its largest tensor once more; the embeddings; the hidden states that `hidden_states_bytes` allows.

    Args:
        model: Without weights, see `open_skeleton`.
        shards: Where the weights are.
        target_of: See `targets`.
        layers: The MoE layers to compress.
        recipe: How.
        data: On what.
        journal: Of the working folder.
        device: Where layers are computed.
        hidden_states_bytes: Most bytes of hidden states to keep in RAM.
        progress: Show a progress bar.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shards: Shards,
        target_of: dict[str, str],
        layers: list[MoeLayer],
        recipe: Recipe,
        data: Calibration,
        journal: Journal,
        *,
        device: torch.device,
        hidden_states_bytes: int,
        progress: bool,
        summary: StreamingSummary,
    ):
        self.model, self.shards, self.recipe, self.data, self.journal = model, shards, recipe, data, journal
        self.device, self.progress, self.summary = device, progress, summary
        self.start = time.perf_counter() - journal.seconds
        self.stack = DecoderStack(model, layers)
        self.hidden_states = HiddenStates(journal.folder, hidden_states_bytes)
        original_format = recipe.layout == "native" or merged_class(type(model)).saves_original_format
        self.output = OutputShards(journal.folder / "model", len(self.stack) + 1, original_format)
        self.layers_of: dict[int, list[MoeLayer]] = {index: [] for index in range(len(self.stack))}
        for layer in layers:
            self.layers_of[self.stack.index_of(f"{layer.name}.")].append(layer)
        self.last_moe = max(index for index, found in self.layers_of.items() if found)
        self.names_of: dict[int | None, list[str]] = {index: [] for index in [None, *self.layers_of]}
        for name, target in target_of.items():
            self.names_of[self.stack.index_of(target)].append(name)
        head = model.get_output_embeddings()
        of_head = {f"{path}." for path, module in model.named_modules() if module is head and head is not None}
        self.after_stack = [n for n in self.names_of[None] if any(n.startswith(path) for path in of_head)]
        self.tied = tied_names(model)
        self.originally = [count(module) for module in self.stack.modules]
        self.prefetcher = ThreadPoolExecutor(max_workers=1)
        self._check_written()

    def read_before_stack(self) -> None:
        """Give everything outside of the decoder layers its weights, except the output head."""
        self._read([name for name in self.names_of[None] if name not in self.after_stack])

    def collect(self, description: str) -> None:
        """Statistics of all layers, saved one layer at a time."""
        done = self.journal.done("statistics")
        self._restore_hidden_states(done)
        for index in self._bar(range(self.last_moe + 1), description, done):
            self._read_layer(index)
            collected = self._forward(index)
            if self.layers_of[index]:
                statistics = {name: one.statistics for name, one in collected.items()}
                saliency = {x.name: saliency_of(x, self.recipe, statistics[x.name]) for x in self.layers_of[index]}
                self._save_statistics(index, collected, saliency)
            self._record("statistics", index, {"hidden": self.hidden_states.record, "outputs": self.stack.num_outputs})
            self._forget(index)

    def compress(
        self, description: str, num_experts: dict[str, int], protected: dict[str, Tensor], *, with_forward: bool
    ) -> None:
        """Compress and write all layers.

        Args:
            description: For the progress bar.
            num_experts: M of each layer, by its name.
            protected: Experts that stay as they are, (N,) bool, by the name of the layers that have some.
            with_forward: Statistics come from a forward now; else from `collect`.
        """
        done = self.journal.done("layer")
        if with_forward:
            self._restore_hidden_states(done)
        for index in self._bar(range(len(self.stack)), description, done):
            self._read_layer(index)
            collected: dict[str, Collected] = {}
            if with_forward and index <= self.last_moe:
                collected = self._forward(index)
            elif self.layers_of[index]:
                collected = self.load_statistics(index)[0]
            start = time.perf_counter()
            reports, layouts, recorded = [], {}, {}
            for layer in self.layers_of[index]:
                of_layer, how = collected.pop(layer.name), (num_experts[layer.name], protected.get(layer.name))
                report, layouts[layer.name], found = compress_layer(layer, self.recipe, of_layer, *how)
                reports.append(asdict(report))
                recorded |= found
            save_file(recorded, self._record_file(index))
            start = self.summary.add_seconds("merge", start)
            written = self._write(index, stored_tensors(self.stack.modules[index], self.stack.prefix(index)))
            self.summary.add_seconds("write", start)
            hidden = {"hidden": self.hidden_states.record, "outputs": self.stack.num_outputs}
            results = {"reports": reports, "layouts": layouts, "count": count(self.stack.modules[index])}
            self._record("layer", index, {**written, **hidden, **results})
            self._forget(index)

    def write_rest(self) -> None:
        """Write everything outside of the decoder layers."""
        if not self.journal.done("rest"):
            self._read(self.after_stack)
            tensors = {
                name: tensor
                for name, tensor in self.model.state_dict().items()
                if self.stack.index_of(name) is None and name not in self.tied
            }
            self._record("rest", len(self.stack), self._write(len(self.stack), tensors))
        release(self.model)
        self.prefetcher.shutdown()

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

    def _check_written(self) -> None:
        for record in self.written():
            file = self.output.folder / record["file"]
            if not file.exists() or file.stat().st_size != record["bytes"]:
                raise ValueError(
                    f"{str(file)!r} was written by an earlier run, but is gone or was changed. "
                    f"Delete {str(self.journal.folder)!r} to start afresh."
                )

    def count_after(self, before: tuple[int, int]) -> tuple[int, int]:
        """(parameters, bytes) of the result, when the original has `before`."""
        records = self.journal.done("layer").values()
        return tuple(
            total - sum(original[place] for original in self.originally) + sum(r["count"][place] for r in records)
            for place, total in enumerate(before)
        )

    def load_statistics(self, index: int) -> tuple[dict[str, Collected], dict[str, Tensor]]:
        """(what the forward left, saliency) that `collect` saved for a decoder layer, by MoE layer."""
        # No code comes out of the file: tensors, plain containers and these values only.
        with torch.serialization.safe_globals([Collected, LayerInputs, LayerStatistics, TensorOfBlock]):
            return torch.load(self._statistics_file(index), map_location=self.device, weights_only=True)

    def _save_statistics(self, index: int, *values: Any) -> None:
        temporary = self._statistics_file(index).with_suffix(".tmp")
        torch.save(values, temporary)
        temporary.rename(self._statistics_file(index))
        self.summary.bytes_written += self._statistics_file(index).stat().st_size

    def _statistics_file(self, index: int) -> Path:
        return self.journal.folder / f"statistics-{index:05d}.pt"

    def _record_file(self, index: int) -> Path:
        """For what report and plots need of the statistics of a decoder layer."""
        return self.journal.folder / f"record-{index:05d}.safetensors"

    def _bar(self, indices: range, description: str, done: dict[int, Any]) -> Any:
        left = [index for index in indices if index not in done]
        self.summary.resumed_visits += len(done)
        return tqdm(left, description, total=len(indices), initial=len(done), unit="layer", disable=not self.progress)

    def _read(self, names: list[str]) -> None:
        load_tensors(self.model, self.shards, names, self.device)
        self.summary.bytes_read += self.shards.num_bytes(names)

    def _read_layer(self, index: int) -> None:
        start = time.perf_counter()
        self._read(self.names_of[index])
        if index not in self.journal.done("statistics"):
            check_finite(self.layers_of[index])
        self.prefetcher.submit(self.shards.prefetch, self.names_of.get(index + 1, []))
        self.summary.add_seconds("read", start)

    def _forward(self, index: int) -> dict[str, Collected]:
        """What a forward leaves of the MoE layers in decoder layer `index`; its outputs replace the hidden states."""
        start = time.perf_counter()
        wanted = wanted_by(self.recipe)
        with self.hidden_states.written(index) as writer, self.stack.only(index) as run:

            def forward(position: int, inputs: dict[str, Any]) -> None:
                given = None if index == 0 else self.hidden_states.read(position)
                output = run(given, **inputs)
                if index < self.last_moe:
                    writer.append(output)

            results = collect(
                self.model,
                self.layers_of[index],
                self.data,
                wanted.statistics,
                progress=False,
                forward=forward,
                **amounts(wanted, keeps_tokens=True),
            )
        self.summary.add_seconds("forward", start)
        self.summary.bytes_written += writer.num_bytes
        return results

    def _restore_hidden_states(self, done: dict[int, dict[str, Any]]) -> None:
        if done:
            last = done[max(done)]
            self.hidden_states.restore(last["hidden"])
            self.stack.num_outputs = last["outputs"]

    def _write(self, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        written = self.output.write(number, self.model, tensors)
        self.summary.bytes_written += written["bytes"]
        return written

    def _record(self, step: str, index: int, values: dict[str, Any]) -> None:
        seconds = time.perf_counter() - self.start
        self.journal.append({"step": step, "layer": index, "seconds": seconds, **values})

    def _forget(self, index: int) -> None:
        release(self.stack.modules[index])
        self.hidden_states.clean()
