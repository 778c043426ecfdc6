"""Watching one layer during calibration: hooks that feed its statistics and keep what it was given."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import CalibrationBatch
from ..families import tied_layers
from ..families.residual import ResidualStream
from ..observation.layer_inputs import LayerInputs, TensorOfBlock, gives_routed_output, ignore_passive
from ..observation.observed import ObservedTokens
from ..types import MoeLayer
from .accumulator import StatisticsAccumulator
from .decoder_inputs import decoder_mask


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
        self.keeps_inputs = True
        self.keeps_outputs = False  # where the experts module gives what its experts give, and nothing else
        self.has_backward = False  # the present batch
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
        if self.accumulator.reads_gradients or self._reads_outputs:
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
        if self.sampled_tokens is not None and self.keeps_inputs and not self.is_deaf:
            hidden_states = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            tokens = hidden_states.shape[:-1].numel()
            taken = [self._take(value, tokens) for value in args]
            self._kept.router_calls.append((tuple(taken), {n: self._take(v, tokens) for n, v in kwargs.items()}))

    def keep_stream(self, stream: Tensor) -> None:
        """Keep the residual stream (T, D) after the layer for the sampled tokens of the present batch."""
        if self.sampled_tokens is not None:
            self._kept.streams.append(stream[self._sampled(len(stream)).to(stream.device)])

    @property
    def _reads_outputs(self) -> bool:
        return self.keeps_outputs and gives_routed_output(self.layer)

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
        if self.is_deaf:
            return
        if self._reads_outputs and self.sampled_tokens is not None:
            rows = output.detach().reshape(-1, output.shape[-1])
            self._kept.outputs.append(rows[self._sampled(len(rows)).to(rows.device)])
        if self.has_backward and output.requires_grad:
            of_batch = self._waiting[-1]
            output.register_hook(lambda gradient: of_batch.append(gradient.detach()))

    def add_gradients(self) -> None:
        """After the backward pass of a batch: add what statistics make of it."""
        for seen, *gradients in self._waiting:
            for gradient in gradients:  # none for experts that the loss does not depend on
                with_gradients = replace(seen, output_gradients=gradient.reshape(-1, gradient.shape[-1]))
                self.accumulator.update_after_backward(with_gradients, self.layer)
        self._waiting = []

    @torch.no_grad()  # a graph in here would not be the same when a checkpointed layer runs again
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
            if self.has_backward:
                self._waiting.append([seen])
        if self.sampled_tokens is not None and self.keeps_inputs:
            rows = self._sampled(tokens).to(index.device)
            index, weights = ignore_passive(index, weights, self.layer.num_slots)
            self._kept.experts_inputs.append((hidden_states.detach()[rows], index[rows], weights.detach()[rows]))
        self._logits = None


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
            kept.streams += more.streams
            kept.outputs += more.outputs
    return [observer for observer in observers if observer.layer.name not in tied]


def announce(
    observers: list[LayerObserver],
    batch: CalibrationBatch,
    limit: int,
    everywhere: int,
    generators: tuple[torch.Generator, torch.Generator],
    device: torch.device,
) -> None:
    """Tell the observers which tokens of the coming batch count, which `limit` to keep, and which go `everywhere`.

    Each of the two draws has a generator of its own.
    """
    for in_decoder in (False, True):
        watching = [observer for observer in observers if observer.in_decoder == in_decoder]
        if not watching:
            continue
        mask = (decoder_mask(batch) if in_decoder else batch.token_mask).flatten()
        sampled = draw(mask, limit, generators[0], device)
        runs_all = not batch.held_out and any(one.accumulator.names_of["every_expert"] for one in watching)
        to_all = draw(mask, everywhere, generators[1], device) if runs_all else None
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
