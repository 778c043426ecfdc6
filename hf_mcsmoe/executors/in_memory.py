"""Statistics of all layers from one forward over the calibration data, the whole model in place."""

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import Calibration, CalibrationBatch
from ..modeling.offload import execution_device
from ..statistics import StatisticsAccumulator
from ..types import LayerStatistics, MoeLayer

HELD_OUT_TOKENS = 512  # per layer: (D + k) numbers each


@dataclass
class HeldOutSample:
    """What a layer was given on a few held-out tokens, to compare its outputs before and after."""

    experts_inputs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # (t, D), (t, k), (t, k)
    router_calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """No held-out token was seen."""
        return not self.experts_inputs


class LayerObserver:
    """Hooks of one layer that feed its accumulator, or its sample while a batch is held out."""

    def __init__(self, layer: MoeLayer, needs: frozenset[str]):
        self.layer = layer
        self.accumulator = StatisticsAccumulator(layer.num_slots, needs)
        self.sample = HeldOutSample()
        self.token_mask: Tensor | None = None
        self.sampled_tokens: Tensor | None = None  # positions in the flattened batch; None: the batch counts
        self._logits: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context the layer reports to this observer."""
        experts, router = self.layer.experts, self.layer.router
        handles = [experts.register_forward_pre_hook(self._on_experts, with_kwargs=True)]
        handles.append(router.register_forward_pre_hook(self._on_router, with_kwargs=True))
        if "logit_gram" in self.accumulator.needs:
            handles.append(self.layer.family.logits_module(self.layer).register_forward_hook(self._on_logits))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_logits(self, module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG002
        logits = output[0] if isinstance(output, tuple) else output
        self._logits = logits.reshape(-1, logits.shape[-1])

    def _on_router(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if self.sampled_tokens is not None:
            taken = [self._take(value) for value in args]
            self.sample.router_calls.append((tuple(taken), {name: self._take(v) for name, v in kwargs.items()}))

    def _take(self, value: Any) -> Any:
        """Rows of a router argument that belong to the sampled tokens; anything else as it is."""
        tokens = self.token_mask.numel()
        if not isinstance(value, Tensor) or value.numel() < tokens:
            return value
        if value.dim() >= 2 and tokens in (value.shape[:-1].numel(), value.numel()):  # hidden states, or token ids
            rows = value.detach().reshape(tokens, -1) if value.numel() != tokens else value.reshape(tokens)
            return rows[self.sampled_tokens.to(value.device)]
        return value

    def _on_experts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        hidden_states, index, weights = self.layer.family.routed_inputs(args, kwargs)
        if index.shape[0] != self.token_mask.numel():
            raise ValueError(
                f"{self.layer.name!r} was given {index.shape[0]} tokens for a batch of {self.token_mask.numel()}. "
                "Its tokens cannot be matched with the padding mask; give calibration rows of one length, unpadded."
            )
        if self.sampled_tokens is None:
            self.accumulator.update(index, weights, self.token_mask, self._logits)
        else:
            rows = self.sampled_tokens.to(index.device)
            self.sample.experts_inputs.append((hidden_states.detach()[rows], index[rows], weights.detach()[rows]))
        self._logits = None


@torch.no_grad()
def collect_statistics(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    calibration: Calibration,
    needs: frozenset[str],
    *,
    seed: int = 0,
    progress: bool = True,
) -> tuple[dict[str, LayerStatistics], dict[str, HeldOutSample]]:
    """Run the model once over the calibration data.

    Args:
        model: In any device map; its mode is restored.
        layers: The layers to watch.
        calibration: Batches; held-out ones only give the samples.
        needs: Fields of `LayerStatistics` to collect.
        seed: Which held-out tokens are sampled.
        progress: Show a progress bar.

    Returns:
        Statistics and held-out sample of each layer, by its name. Memory: O(N^2) a layer and
        `HELD_OUT_TOKENS` rows of D numbers.

    Raises:
        ValueError: A layer saw no token, or its sums are NaN or Inf.
    """
    observers = [LayerObserver(layer, needs) for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    num_held_out = sum(batch.held_out for batch in calibration.batches)
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer.attached())
            for batch in tqdm(calibration.batches, desc="calibrating", unit="batch", disable=not progress, delay=2):
                limit = math.ceil(HELD_OUT_TOKENS / num_held_out) if batch.held_out else None
                announce(observers, batch, limit, generator, input_device(model))
                inputs = {name: to_device(value, input_device(model)) for name, value in batch.inputs.items()}
                model(**inputs, **cheap_forward(model))
    finally:
        model.train(was_training)
    statistics = {o.layer.name: o.accumulator.finish(o.layer.name) for o in observers}
    return statistics, {o.layer.name: o.sample for o in observers}


def announce(
    observers: list[LayerObserver],
    batch: CalibrationBatch,
    limit: int | None,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Tell the observers which tokens of the coming batch count; with `limit`, which held-out ones to sample."""
    mask = batch.token_mask.flatten()
    sampled = None
    if limit is not None:
        real = mask.nonzero().flatten()
        sampled = real[torch.randperm(real.numel(), generator=generator)[:limit]].sort().values.to(device)
    for observer in observers:
        observer.token_mask = mask.to(device)
        observer.sampled_tokens = sampled


def cheap_forward(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that spare the parts of a forward that calibration does not look at: cache and most logits."""
    parameters = inspect.signature(type(model).forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in parameters}


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model expects its inputs."""
    return execution_device(model.get_input_embeddings())


def to_device(value: Any, device: torch.device) -> Any:
    """`value` on `device` if it is a tensor."""
    return value.to(device) if isinstance(value, Tensor) else value
