"""Statistics of all layers from one forward over the calibration data, the whole model in place."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..accumulator import StatisticsAccumulator
from ..calibration import Calibration, CalibrationBatch
from ..families import forward_call, reading_part, tied_layers
from ..families.residual import ResidualStream
from ..layer_inputs import LayerInputs, TensorOfBlock, ignore_passive, tokens_of_batch
from ..modeling.offload import execution_device
from ..observed import ObservedTokens
from ..statistics import STATISTICS
from ..types import LayerStatistics, MoeLayer
from .decoder_inputs import decoder_mask, decoder_modules, with_decoder_inputs
from .gradients import check_gradients, check_in_memory, differentiable, loss_of

HELD_OUT_TOKENS = 512  # per layer: (D + k) numbers each
FIT_HELD_OUT_TOKENS = 4096  # where they choose a ridge and judge a refit, too


class LayerObserver:
    """Hooks of one layer that feed its accumulator, except while a batch is held out, and keep what it was given."""

    def __init__(self, layer: MoeLayer, needs: frozenset[str], in_decoder: bool = False):
        self.layer = layer
        self.in_decoder = in_decoder  # of an encoder-decoder: its tokens are the decoder's
        self.accumulator = StatisticsAccumulator(layer.num_slots, needs)
        self.held_out = LayerInputs()
        self.calibration = LayerInputs()
        self.token_mask: Tensor | None = None
        self.is_held_out = False  # the present batch
        self.sampled_tokens: Tensor | None = None  # positions in the flattened batch to keep; None: none of them
        self.everywhere_tokens: Tensor | None = None  # positions of tokens that every expert is run on
        self.residual: ResidualStream | None = None
        self.is_deaf = False  # while a backward pass runs layers once more
        self._waiting: list[list[Any]] = []  # (what was observed, d loss / d output) of the present batch
        self._logits: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context the layer reports to this observer."""
        experts, router, family = self.layer.experts, self.layer.router, self.layer.family
        handles = [router.register_forward_pre_hook(self._on_router, with_kwargs=True)]
        if self.accumulator.reads_logits:
            handles.append(family.logits_module(self.layer).register_forward_hook(self._on_logits))
        if family.observes_router:  # after the hook on the logits, which may be of the same module
            handles.append(router.register_forward_hook(self._on_router_output))
        else:
            handles.append(experts.register_forward_pre_hook(self._on_experts, with_kwargs=True))
        if self.accumulator.reads_gradients:
            handles.append(experts.register_forward_hook(self._on_output))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_logits(self, module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG002
        logits = self.layer.family.logits(output)
        self._logits = logits.reshape(-1, logits.shape[-1])[:, : self.layer.num_slots]

    def _on_router(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if self.sampled_tokens is not None and not self.is_deaf:
            hidden_states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            tokens = hidden_states.shape[:-1].numel()
            taken = [self._take(value, tokens) for value in args]
            self._kept.router_calls.append((tuple(taken), {n: self._take(v, tokens) for n, v in kwargs.items()}))

    @property
    def _kept(self) -> LayerInputs:
        return self.held_out if self.is_held_out else self.calibration

    def _take(self, value: Any, tokens: int) -> Any:
        """The sampled rows of a router argument, as one batch row of tokens; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        for name, tensor in [*self.layer.block._parameters.items(), *self.layer.block._buffers.items()]:
            if tensor is value:
                return TensorOfBlock(name)
        if value.dim() < 2 or tokens not in (value.shape[:-1].numel(), value.numel()):
            return value
        # Hidden states (B, S, D) or (T, D), or token ids (B, S); some routers accept only the shape they are given.
        per_token = value.detach().reshape(tokens, *([] if value.numel() == tokens else [-1]))
        rows = per_token[self._sampled(tokens).to(value.device)]
        return rows if per_token.dim() == value.dim() else rows[None]

    def _counted(self, tokens: int) -> Tensor:
        """Which of the tokens that the layer was given count, (tokens,) bool."""
        if tokens == self.token_mask.numel():
            return self.token_mask
        # Images, canvases, one modality of several: real tokens only, unless padding was left in.
        if self.token_mask.all() or tokens == self.token_mask.sum():
            return self.token_mask.new_ones(tokens)
        raise ValueError(
            f"{self.layer.name!r} was given {tokens} tokens for a batch of {self.token_mask.numel()}. "
            "Its tokens cannot be matched with the padding mask; give calibration rows of one length, unpadded."
        )

    def _sampled(self, tokens: int) -> Tensor:
        """Positions of the tokens to keep."""
        return self._among(self.sampled_tokens, tokens)

    def _among(self, drawn: Tensor, tokens: int) -> Tensor:
        """The drawn positions in the batch, or as many in what the layer was given where that has other tokens."""
        if tokens == self.token_mask.numel():
            return drawn
        return self._counted(tokens).nonzero().flatten()[: drawn.numel()]

    def _on_experts(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        self._record(*self.layer.family.routed_inputs(args, kwargs))

    def _on_router_output(self, module: nn.Module, args: tuple, output: Any) -> None:  # noqa: ARG002
        self._record(*self.layer.family.routed_by_router(self.layer, args, output))

    def _on_output(self, module: nn.Module, args: tuple, output: Tensor) -> None:  # noqa: ARG002
        if not self.is_deaf and output.requires_grad:
            of_batch = self._waiting[-1]
            output.register_hook(lambda gradient: of_batch.append(gradient.detach()))

    def add_gradients(self) -> None:
        """After the backward pass of a batch: add what statistics make of it."""
        for seen, *gradients in self._waiting:
            for gradient in gradients:  # none for experts that the loss does not depend on
                with_gradients = replace(seen, output_gradients=gradient.reshape(-1, gradient.shape[-1]))
                self.accumulator.update_after_backward(with_gradients, self.layer)
        self._waiting = []

    def _record(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> None:
        if self.is_deaf:
            return
        tokens = index.shape[0]
        counted = self._counted(tokens)
        if not self.is_held_out:
            everywhere = self.everywhere_tokens
            sampled = self._among(everywhere, tokens).to(index.device) if everywhere is not None else None
            seen = ObservedTokens(
                self.layer.num_slots,
                hidden_states.detach(),
                index,
                weights.detach(),
                counted,
                self._logits,
                sampled,
                self.residual.value if self.residual is not None else None,
            )
            self.accumulator.update(seen, self.layer)
            if self.accumulator.reads_gradients:
                self._waiting.append([seen])
        if self.sampled_tokens is not None:
            rows = self._sampled(tokens).to(index.device)
            index, weights = ignore_passive(index, weights, self.layer.num_slots)
            self._kept.experts_inputs.append((hidden_states.detach()[rows], index[rows], weights.detach()[rows]))
        self._logits = None


@dataclass(frozen=True, eq=False)
class Collected:
    """What a forward over the calibration data left of one layer."""

    statistics: LayerStatistics | None  # None: no token reached the layer
    held_out: LayerInputs
    calibration: LayerInputs  # empty unless tokens were asked for


def collect_statistics(
    model: PreTrainedModel, layers: list[MoeLayer], calibration: Calibration, needs: frozenset[str], **options: Any
) -> tuple[dict[str, LayerStatistics], dict[str, LayerInputs]]:
    """Statistics by the name of the layer, without those that no token reached, and held-out samples; see `collect`.

    Raises:
        ValueError: No layer saw a token, or the sums of one are NaN or Inf.
    """
    collected = collect(model, layers, calibration, needs, **options)
    return reached(collected), {name: one.held_out for name, one in collected.items()}


def reached(collected: dict[str, Collected]) -> dict[str, LayerStatistics]:
    """The statistics of the layers that a token reached."""
    return {name: one.statistics for name, one in collected.items() if one.statistics is not None}


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    calibration: Calibration,
    needs: frozenset[str],
    *,
    seed: int = 0,
    progress: bool = True,
    forward: Callable[[int, dict[str, Any]], Any] | None = None,
    held_out_tokens: int = HELD_OUT_TOKENS,
    calibration_tokens: int = 0,
    every_expert_tokens: int = 0,
) -> dict[str, Collected]:
    """Run the model once over the calibration data.

    An encoder-decoder also needs target tokens: see `with_decoder_inputs`. Padding of either side does not count.

    Args:
        model: In any device map; its mode is restored.
        layers: The layers to watch.
        calibration: Batches; held-out ones only give the samples.
        needs: Names in `STATISTICS`.
        seed: Which tokens are sampled.
        progress: Show a progress bar.
        forward: Runs what is to be watched, given the position of a batch and the model's arguments; None runs
            the model.
        held_out_tokens: About how many held-out tokens to keep the inputs of.
        calibration_tokens: About how many of the others.
        every_expert_tokens: About how many tokens all experts are run on, for the statistics that ask for that.

    Returns:
        By the name of the layer. Memory: that of the statistics, and D + k numbers for each token that is kept, twice
        D where the router is called with hidden states.

    Raises:
        ValueError: No layer saw a token, or the sums of one are NaN or Inf.
    """
    of_gradients = sorted(name for name in needs if STATISTICS.trait(name, "gradients", False))
    if of_gradients:
        check_gradients(model, layers, of_gradients)
        check_in_memory(model)
    in_decoder = decoder_modules(model)
    observers = [LayerObserver(layer, needs, layer.experts in in_decoder) for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    num_held_out = sum(batch.held_out for batch in calibration.batches)
    num_others = len(calibration.batches) - num_held_out
    limit_of = {
        True: tokens_of_batch(held_out_tokens, num_held_out),
        False: tokens_of_batch(calibration_tokens, num_others),
    }
    everywhere = tokens_of_batch(every_expert_tokens, num_others)
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            for observer in observers:
                if observer.accumulator.reads_residual:
                    observer.residual = ResidualStream(model, observer.layer)
                    stack.enter_context(observer.residual.attached())
                stack.enter_context(observer.attached())
            if of_gradients:
                stack.enter_context(differentiable(model))
            bar = tqdm(calibration.batches, desc="calibrating", unit="batch", disable=not progress, delay=2)
            for position, batch in enumerate(bar):
                batch = with_decoder_inputs(batch, model)
                announce(observers, batch, limit_of[batch.held_out], everywhere, generator, input_device(model))
                inputs = {name: to_device(value, input_device(model)) for name, value in batch.inputs.items()}
                called, inputs = forward_call(model, inputs)
                inputs |= cheap_forward(called)
                if of_gradients and not batch.held_out:
                    run_backward(called, inputs, batch, observers)
                elif forward is None:
                    called(**inputs)
                else:
                    forward(position, inputs)
    finally:
        model.train(was_training)
    observers = join_tied(observers)
    if observers and not any(o.accumulator.num_tokens for o in observers):
        observers[0].accumulator.finish(observers[0].layer.name)  # raises
    return {
        o.layer.name: Collected(
            o.accumulator.finish(o.layer.name) if o.accumulator.num_tokens else None, o.held_out, o.calibration
        )
        for o in observers
    }


def run_backward(
    called: nn.Module, inputs: dict[str, Any], batch: CalibrationBatch, observers: list[LayerObserver]
) -> None:
    """A forward that observers watch, and a backward in which they only note gradients.

    Memory: the inputs of all decoder layers, the graph of one and the logits of the batch, and 2 D numbers for each of
    its tokens and MoE layers.
    """
    with torch.enable_grad():
        loss = loss_of(called, inputs, batch.token_mask)
        for observer in observers:
            observer.is_deaf = True
        try:
            loss.backward()
        finally:
            for observer in observers:
                observer.is_deaf = False
    for observer in observers:
        observer.add_gradients()


def join_tied(observers: list[LayerObserver]) -> list[LayerObserver]:
    """The observers of layers with experts of their own, which also get what those saw that share them."""
    by_name = {observer.layer.name: observer for observer in observers}
    tied = tied_layers([observer.layer for observer in observers])
    for name, first in tied.items():
        one, other = by_name[first.name], by_name[name]
        one.accumulator.add(other.accumulator)
        for kept, more in ((one.held_out, other.held_out), (one.calibration, other.calibration)):
            kept.experts_inputs += more.experts_inputs
            kept.router_calls += more.router_calls
    return [observer for observer in observers if observer.layer.name not in tied]


def announce(
    observers: list[LayerObserver],
    batch: CalibrationBatch,
    limit: int,
    everywhere: int,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Tell the observers which tokens of the coming batch count, which `limit` to keep, and which go `everywhere`."""
    for in_decoder in (False, True):
        watching = [observer for observer in observers if observer.in_decoder == in_decoder]
        if not watching:
            continue
        mask = (decoder_mask(batch) if in_decoder else batch.token_mask).flatten()
        sampled = draw(mask, limit, generator, device)
        runs_all = not batch.held_out and any(one.accumulator.names_of["every_expert"] for one in watching)
        to_all = draw(mask, everywhere, generator, device) if runs_all else None
        for observer in watching:
            observer.token_mask = mask.to(device)
            observer.is_held_out = batch.held_out
            observer.sampled_tokens = sampled
            observer.everywhere_tokens = to_all


def draw(mask: Tensor, limit: int, generator: torch.Generator, device: torch.device) -> Tensor | None:
    """At most `limit` positions of real tokens, (t,) int64 ascending; None for a limit of 0."""
    if limit == 0:
        return None
    real = mask.nonzero().flatten()
    return real[torch.randperm(real.numel(), generator=generator)[:limit]].sort().values.to(device)


def cheap_forward(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that spare the parts of a forward that calibration does not look at: cache and most logits."""
    parameters = inspect.signature(type(model).forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in parameters}


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model expects its inputs."""
    return execution_device(reading_part(model).get_input_embeddings())


def to_device(value: Any, device: torch.device) -> Any:
    """`value` on `device` if it is a tensor."""
    return value.to(device) if isinstance(value, Tensor) else value
