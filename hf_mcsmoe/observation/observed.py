"""What a layer did with one batch of calibration tokens: all that statistics are sums of.

T tokens of the batch, k top-k, N slots, D hidden size, I width, t tokens of one expert or of a sample.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..types import ExpertWeights, MoeLayer

# Numbers that all experts together give at a time where every expert sees every token: 64 MB.
MOST_OUTPUTS = 2**24


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True, eq=False)
class ObservedTokens:
    """The routing of one batch, padding included: `token_mask` says what counts."""

    num_slots: int  # N
    hidden_states: Tensor  # (T, D), what the experts were given
    top_k_index: Tensor  # (T, k) int64: slots that the router chose
    top_k_weights: Tensor  # (T, k): what the block multiplies outputs with; 0 for a slot that is skipped
    token_mask: Tensor  # (T,) bool: True for tokens that count
    logits: Tensor | None = None  # (T, N): of the router
    sampled: Tensor | None = None  # (t,) int64: tokens that every expert is run on; None: none of them
    residual: Tensor | None = None  # (T, D): the stream that the routed output is added to; if a statistic reads it
    output_gradients: Tensor | None = None  # (T, D): d loss / d output of the experts together; if there are any

    @cached_property
    def counted(self) -> Tensor:
        """Which choices count, (T, k) bool: real tokens, weights other than 0, experts that are no identity."""
        real = self.token_mask.to(self.top_k_index.device)[:, None]
        return real & (self.top_k_weights != 0) & (self.top_k_index < self.num_slots)

    def sum_by_slot(self, values: Tensor) -> Tensor:
        """Sums of `values` (T, k) over the choices of each slot that count, (N,)."""
        slots = torch.where(self.counted, self.top_k_index, self.num_slots).flatten()  # the others go past the end
        sums = values.new_zeros(self.num_slots + 1)
        return sums.index_add_(0, slots, torch.where(self.counted, values, 0).flatten())[: self.num_slots]


@dataclass(frozen=True, eq=False)
class ExpertTokens:
    """What one expert was given in a batch and makes of it, float32. Computed when first asked for."""

    expert: int
    tokens: Tensor  # (t,) int64: positions in the batch, ascending
    hidden_states: Tensor  # (t, D)
    gates: Tensor  # (t,): what the block multiplies the outputs with
    weights: ExpertWeights  # of this expert alone, with a leading axis of 1, in the dtype of the model
    activation: Callable[[Tensor, Tensor | None], Tensor]
    finish: Callable[[Tensor], Tensor]  # what the experts module does to outputs besides weighting them
    output_gradients: Tensor | None = None  # (t, D): d loss / d outputs, the gate included; for `gradients` statistics

    @cached_property
    def projections(self) -> tuple[Tensor, Tensor | None]:
        """What the activation is given: (of `up` (t, I), of `gate` (t, I) or None)."""
        return self._project("up"), self._project("gate") if self.weights.gate is not None else None

    @cached_property
    def activations(self) -> Tensor:
        """What `down` is multiplied with, (t, I)."""
        return self.activation(*self.projections)

    @cached_property
    def outputs(self) -> Tensor:
        """Of the expert, before the gate, (t, D)."""
        return self.finish(linear(self.activations, *self._matrix("down")))

    def _matrix(self, name: str) -> tuple[Tensor, Tensor | None]:
        bias = getattr(self.weights, f"{name}_bias")
        return getattr(self.weights, name)[0].float(), None if bias is None else bias[0].float()

    def _project(self, name: str) -> Tensor:
        return linear(self.hidden_states, *self._matrix(name))


@dataclass(frozen=True, eq=False)
class ChosenOutputs:
    """What the chosen experts make of a few tokens, choice by choice; float32."""

    num_slots: int  # N
    index: Tensor  # (t, k) int64: slots that the router chose; N for a choice that does not count
    gates: Tensor  # (t, k): what the block multiplies outputs with; 0 for a choice that does not count
    outputs: Tensor  # (t, k, D), before the gates; 0 for a choice that does not count


@dataclass(frozen=True, eq=False)
class EveryExpert:
    """What all experts make of a few sampled tokens, whether the router sent them there or not; float32."""

    hidden_states: Tensor  # (t, D)
    outputs: Tensor  # (N, t, D), before the gates
    gates: Tensor  # (t, N): what the block multiplies outputs with; 0 where the router did not choose
    logits: Tensor | None  # (t, N): of the router, if they were recorded


class RunningExperts:
    """Runs the experts of a layer one by one, as they are stored; its weights must be on a real device."""

    def __init__(self, layer: MoeLayer):
        stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
        self.weights = layer.family.view(layer, stacked)
        self.activation = layer.family.activation(layer)
        self.layer = layer

    def on(self, expert: int, observed: ObservedTokens, tokens: Tensor, gates: Tensor) -> ExpertTokens:
        """One expert on the tokens at the positions `tokens` (t,)."""
        gradients = observed.output_gradients
        return ExpertTokens(
            expert,
            tokens,
            observed.hidden_states[tokens].float(),
            gates.float(),
            ExpertWeights(**{name: tensor[expert : expert + 1] for name, tensor in self.weights.tensors().items()}),
            self.activation,
            lambda output: self.layer.family.finish(self.layer.experts, output),
            None if gradients is None else gradients[tokens].float() * gates.float()[:, None],
        )

    def where_routed(self, observed: ObservedTokens) -> Iterator[ExpertTokens]:
        """Each expert on the tokens that count and that the router sent to it; a token has an expert once.

        One expert at a time: t (D + I) numbers. The host waits for the device once a batch.
        """
        counted = observed.counted
        gates = observed.top_k_weights.float()
        num_slots = observed.num_slots
        token = torch.arange(len(gates), device=gates.device)[:, None].expand_as(gates)
        slot = torch.where(counted, observed.top_k_index, num_slots)
        order = slot.flatten().argsort(stable=True)
        sizes = slot.flatten().bincount(minlength=num_slots + 1).tolist()
        tokens = token.flatten()[order].split(sizes)
        weights = gates.flatten()[order].split(sizes)
        for expert in range(num_slots):
            yield self.on(expert, observed, tokens[expert], weights[expert])

    def together(self, observed: ObservedTokens) -> Iterator[ChosenOutputs]:
        """The outputs of all chosen experts of a token beside each other, a few tokens at a time.

        Memory: t k D numbers, at most `MOST_OUTPUTS`.
        """
        width = observed.hidden_states.shape[-1]
        size = max(1, MOST_OUTPUTS // (observed.top_k_index.shape[1] * width))
        for tokens in torch.arange(len(observed.hidden_states), device=observed.top_k_index.device).split(size):
            part = take(observed, tokens)
            index = torch.where(part.counted, part.top_k_index, part.num_slots)
            outputs = torch.zeros(*index.shape, width, device=index.device)
            for routed in self.where_routed(part):
                choice = (index[routed.tokens] == routed.expert).int().argmax(1)
                outputs[routed.tokens, choice] = routed.outputs
            gates = torch.where(part.counted, part.top_k_weights.float(), 0.0)
            yield ChosenOutputs(part.num_slots, index, gates, outputs)

    def everywhere(self, observed: ObservedTokens) -> Iterator[EveryExpert]:
        """All experts on the sampled tokens, a few tokens at a time: at most `MOST_OUTPUTS` numbers."""
        if observed.sampled is None:
            return
        size = max(1, MOST_OUTPUTS // (observed.num_slots * observed.hidden_states.shape[-1]))
        for tokens in observed.sampled.split(size):
            part = take(observed, tokens)
            ones = part.top_k_weights.new_ones(len(tokens))
            positions = torch.arange(len(tokens), device=tokens.device)
            outputs = [self.on(e, part, positions, ones).outputs for e in range(observed.num_slots)]
            gates = torch.zeros(len(tokens), observed.num_slots + 1, device=tokens.device)
            slot = torch.where(part.counted, part.top_k_index, observed.num_slots)
            gates.scatter_add_(1, slot, part.top_k_weights.float())
            logits = part.logits.float() if part.logits is not None else None
            yield EveryExpert(part.hidden_states.float(), torch.stack(outputs), gates[:, :-1], logits)


def take(observed: ObservedTokens, tokens: Tensor) -> ObservedTokens:
    """The tokens at some positions of a batch alone."""
    return dataclasses.replace(
        observed,
        hidden_states=observed.hidden_states[tokens],
        top_k_index=observed.top_k_index[tokens],
        top_k_weights=observed.top_k_weights[tokens],
        token_mask=observed.token_mask.to(tokens.device)[tokens],
        logits=observed.logits[tokens] if observed.logits is not None else None,
        sampled=None,
        residual=None,
        output_gradients=None,
    )
