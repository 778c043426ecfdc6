"""A model whose decoder layers are read, run and forgotten one at a time, and the hidden states between them."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..types import MoeLayer
from .decoder_stack import DecoderStack
from .hidden_states import HiddenStates
from .in_memory import Collected, collect
from .kept_inputs import amounts
from .layer_reader import LayerReader
from .shards import Shards
from .skeleton import load_tensors, release
from .streaming_summary import StreamingSummary
from .wanted import Wanted


class StreamedModel:
    """Weights come from the shards, a decoder layer at a time; the calibration data wait between the layers.

    Memory: one decoder layer, and the next one as it is stored; while a layer is fused from experts stored one by one
    it is there twice; what is outside of the decoder layers; the hidden states that `hidden_states_bytes` allows,
    twice if the recipe has `targets`.

    Args:
        model: Without weights, see `open_skeleton`.
        shards: Where the weights are.
        target_of: See `targets`.
        layers: The MoE layers to compress.
        data: What is run.
        folder: For hidden states.
        device: Where layers are computed.
        hidden_states_bytes: Most bytes of hidden states to keep in RAM.
        summary: Counts bytes and seconds.

    Raises:
        NotStreamableError: The layers cannot run one at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shards: Shards,
        target_of: Mapping[str, str],
        layers: list[MoeLayer],
        data: Calibration,
        folder: Path,
        *,
        device: torch.device,
        hidden_states_bytes: int,
        summary: StreamingSummary,
    ):
        self.model, self.shards, self.data, self.device, self.summary = model, shards, data, device, summary
        self.stack = DecoderStack(model, layers)
        self.hidden_states = HiddenStates(folder, hidden_states_bytes)
        self.original_states = HiddenStates(folder, hidden_states_bytes, "original_states")  # if targets need them
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
        self.reader = LayerReader(shards, device)

    def read_before_stack(self) -> None:
        """Give everything outside of the decoder layers its weights, except the output head."""
        self._read([name for name in self.names_of[None] if name not in self.after_stack])

    def read_after_stack(self) -> None:
        """Give the output head its weights."""
        self._read(self.after_stack)

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Within the context a decoder layer has its weights, and a thread reads those of the next one."""
        start = time.perf_counter()
        self._read(self.names_of[index])
        self.reader.ask(self.names_of.get(index + 1, []))
        self.summary.add_seconds("read", start)
        yield
        release(self.stack.modules[index])
        self.hidden_states.clean()
        self.original_states.clean()

    def close(self) -> None:
        """Forget all weights."""
        release(self.model)
        self.reader.close()

    def observe(
        self,
        index: int,
        layers: list[MoeLayer],
        wanted: Wanted,
        needs: frozenset[str],
        *,
        passes_on: bool,
        states: HiddenStates | None = None,
        keeps_inputs: bool = True,
    ) -> dict[str, Collected]:
        """Run the calibration data through a decoder layer as it is now.

        Args:
            index: Of the decoder layer.
            layers: Of its MoE layers, those to watch.
            wanted: How many tokens to keep.
            needs: Statistics to collect.
            passes_on: The outputs become the hidden states of the next layer; else those of this one stay.
            states: What the layers before it give; None for `hidden_states`.
            keeps_inputs: Keep the inputs of the MoE layers, beside what `wanted` says.

        Returns:
            What the forward left, by the name of the MoE layer; no statistics where no token reached it.
        """
        start = time.perf_counter()
        writes = passes_on and index < self.last_moe
        states = self.hidden_states if states is None else states
        give = states.take if passes_on else states.read
        writing = states.written(index) if writes else nullcontext()
        with writing as writer, self.stack.only(index) as run:

            def forward(position: int, inputs: dict[str, Any]) -> None:
                output = run(None if index == 0 else give(position), **inputs)
                if writer is not None:
                    writer.append(output)

            how = {**amounts(wanted, keeps_tokens=True), "refuse_unreached": False, "progress": False}
            how |= {"keeps_streams": wanted.targets is not None, "keeps_inputs": keeps_inputs}
            found = collect(self.model, layers, self.data, needs, forward=forward, **how)
        self.summary.add_seconds("forward", start)
        self.summary.bytes_written += writer.num_bytes if writer is not None else 0
        return found

    @property
    def record(self) -> dict[str, Any]:
        """Where the calibration data wait, as JSON, for `restore`."""
        states = {"hidden": self.hidden_states.record, "original": self.original_states.record}
        return {**states, "outputs": self.stack.num_outputs}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on where an earlier run was when it got `record`."""
        self.hidden_states.restore(record["hidden"])
        self.original_states.restore(record["original"])
        self.stack.num_outputs = record["outputs"]

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Parameters and saved buffers of a decoder layer, by full name."""
        return self.stack.modules[index].state_dict(prefix=self.stack.prefix(index))

    def tensors_outside(self) -> dict[str, Tensor]:
        """Parameters and saved buffers outside of the decoder layers, by full name."""
        return {name: t for name, t in self.model.state_dict().items() if self.stack.index_of(name) is None}

    def _read(self, names: list[str]) -> None:
        load_tensors(self.model, self.shards, self.reader.take(names), self.device)
        self.summary.bytes_read += self.shards.num_bytes(names)
