"""The tokens of one layer as one value, with the gates that its router gives them, kept or computed anew."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn

from ..expert_values import PackedExperts
from ..observation.beside_experts import BesideExperts
from ..observation.gated_features import Activation, apply_down, dense_gates
from ..observation.layer_inputs import LayerInputs
from ..observation.token_batches import RoutedTokens
from ..types import MoeLayer

BATCH_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class TokenRows:
    """An argument of a router that has an entry for every token."""

    values: Tensor  # (T, ...)
    is_batched: bool  # the router gets (1, t, ...), not (t, ...)

    def take(self, index: Tensor) -> Tensor:
        """The entries of the tokens `index`, floating ones in float32."""
        rows = self.values[index.to(self.values.device)]
        rows = rows.float() if rows.is_floating_point() else rows
        return rows[None] if self.is_batched else rows


class TrainableRouter:
    """A float32 copy of a layer's router that can be trained, and what it was called with for all tokens.

    Args:
        layer: With the router that the result will have.
        inputs: What it was called with.
        assignment: (slots, M) float32: which expert a slot goes to.
    """

    def __init__(self, layer: MoeLayer, inputs: LayerInputs, assignment: Tensor):
        self.module = copy.deepcopy(layer.router).float().requires_grad_(True)
        self.layer = dataclasses.replace(layer, router=self.module)
        self.assignment = assignment
        calls = [inputs.router_call(position, layer.block) for position in range(len(inputs.router_calls))]
        counts = [len(index) for _, index, _ in inputs.experts_inputs]
        arguments = zip(*(args for args, _ in calls), strict=True)
        self.arguments = tuple(join(values, counts) for values in arguments)
        self.keywords = {name: join([kwargs[name] for _, kwargs in calls], counts) for name in calls[0][1]}

    def beside(self, inputs: LayerInputs) -> "TrainableRouter":
        """The same router for other tokens."""
        other = TrainableRouter(self.layer, inputs, self.assignment)
        other.module, other.layer = self.module, self.layer
        return other

    def gates(self, index: Tensor) -> Tensor:
        """Weights of the M experts for the tokens `index`, (t, M) float32 with gradients."""
        arguments = tuple(v.take(index) if isinstance(v, TokenRows) else v for v in self.arguments)
        keywords = {n: v.take(index) if isinstance(v, TokenRows) else v for n, v in self.keywords.items()}
        slots, weights = self.layer.family.route(self.layer, arguments, keywords)
        gates = dense_gates(slots, weights, len(self.assignment))
        return gates @ self.assignment.to(gates.device)

    @torch.no_grad()
    def write_back(self, router: nn.Module) -> None:
        """Round what was trained into a router of the same shape."""
        for parameter, trained in zip(router.parameters(), self.module.parameters(), strict=True):
            parameter.copy_(trained)


def can_train_router(layer: MoeLayer) -> bool:
    """Whether the router's weights are at hand and all tokens have an output: not offloaded, no capacity."""
    offloaded = any(has_offloaded_params(module) for module in layer.router.modules())
    return not (offloaded or layer.family.has_capacity)


def join(values: Sequence[Any], counts: list[int]) -> Any:
    """One argument of several calls, as the argument of one call; what is no tensor must be the same in all."""
    first = values[0]
    if not isinstance(first, Tensor):
        return first
    if all(value.shape[0] == count for value, count in zip(values, counts, strict=True)):
        return TokenRows(torch.cat(list(values)), is_batched=False)
    if all(value.shape[:2] == (1, count) for value, count in zip(values, counts, strict=True)):
        return TokenRows(torch.cat([value[0] for value in values]), is_batched=True)
    return first


class MatchingTokens:
    """All kept tokens of a layer, with what is left for its routed experts to give.

    Args:
        tokens: Batches with the gates that were kept.
        router: Gives the gates anew; None: the kept ones hold.
        beside: What the layer adds beside its routed experts, which is not trained; None for nothing.
    """

    def __init__(
        self, tokens: list[RoutedTokens], router: TrainableRouter | None = None, beside: BesideExperts | None = None
    ):
        self.hidden_states = torch.cat([batch.hidden_states for batch in tokens])
        self.gates = torch.cat([batch.gates for batch in tokens])
        self.targets = torch.cat([batch.targets for batch in tokens])
        self.dropped_gates = None
        if any(batch.dropped_gates is not None for batch in tokens):
            self.dropped_gates = torch.cat([batch.dropped_gates for batch in tokens])
        self.added = None if beside is None else torch.cat([beside.output(batch) for batch in tokens])
        if self.added is not None:
            self.targets = self.targets - self.added
        self.router = router

    def __len__(self) -> int:
        return len(self.hidden_states)

    @property
    def energy(self) -> float:
        """Sum of the squared targets."""
        return self.targets.double().square().sum().item()

    def router_parameters(self) -> list[nn.Parameter]:
        """What can be trained of the router."""
        return [] if self.router is None else list(self.router.module.parameters())

    def batch(self, index: Tensor) -> RoutedTokens:
        """The tokens `index`; their gates have gradients where there is a router."""
        gates = self.gates[index] if self.router is None else self.router.gates(index)
        return RoutedTokens(self.hidden_states[index].float(), gates, self.targets[index].float())

    @torch.no_grad()
    def batches(self) -> list[RoutedTokens]:
        """All tokens with the gates that they have now, and with what the whole layer is to give."""
        parts = torch.arange(len(self)).split(BATCH_TOKENS)
        return [self._whole(self.batch(index), index) for index in parts]

    def _whole(self, batch: RoutedTokens, index: Tensor) -> RoutedTokens:
        """A batch with the targets that it had before `added` was taken off, and with its gates of dropped slots."""
        targets = batch.targets if self.added is None else batch.targets + self.added[index]
        gates = None if self.dropped_gates is None else self.dropped_gates[index]
        return dataclasses.replace(batch, targets=targets, dropped_gates=gates)


@torch.no_grad()
def held_out_error(experts: PackedExperts, activation: Activation, held_out: MatchingTokens) -> float:
    """Squared error over all held-out tokens."""
    error = torch.zeros((), dtype=torch.float64)
    for index in torch.arange(len(held_out)).split(BATCH_TOKENS):
        batch = held_out.batch(index)
        error += (apply_down(experts, activation, batch) - batch.targets).double().square().sum().cpu()
    return error.item()
