"""What a layer adds beside the output of its routed experts, as features of the same least-squares problem.

T tokens, P neurons of all routed experts, D hidden size. A layer that is being refitted computes

    y_t = phi_t down  +  s_t (down_s + change_s)  +  c_t (vectors + change_c)

where s are the neurons of the shared expert times its gate, which all tokens touch, and c the gates of dropped slots,
which add constant vectors. The original layer has s down_s too, and what constants add is taken off the targets, so
both cancel: the changes are blocks of the fit like the down projections of experts, that start from 0.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from .token_batches import RoutedTokens


@dataclass(frozen=True, eq=False)
class BesideExperts:
    """The blocks of features beside those of routed experts, and what is added to their matrices."""

    shared: Callable[[Tensor], Tensor] | None  # hidden states (t, D) -> (t, width) float32; None: no shared expert
    widths: tuple[int, int]  # of the shared expert; number of constants
    change: Tensor  # (sum of widths, D) float32: of the last matrix of the shared expert, transposed; of the constants

    @property
    def changes(self) -> tuple[Tensor, Tensor]:
        """`change` of the shared expert, (width, D), and of the constants, (R, D)."""
        return self.change.split(self.widths)

    def features(self, batch: RoutedTokens) -> list[tuple[Tensor, Tensor]]:
        """For each block (its tokens (t,) int64 ascending, their features (t, width) float32)."""
        device = self.change.device
        found = []
        if self.widths[0]:
            features = self.shared(batch.hidden_states).to(device)
            features = features if batch.scale is None else features * batch.scale.to(device)[:, None]
            found.append((torch.arange(len(features), device=device), features))
        if self.widths[1]:
            gates = batch.dropped_gates.to(device)
            tokens = gates.any(1).nonzero().flatten()
            found.append((tokens, gates[tokens]))
        return found

    def output(self, batch: RoutedTokens) -> Tensor:
        """What the change adds for the tokens of a batch, (t, D) float32."""
        output = torch.zeros(batch.hidden_states.shape, device=self.change.device)
        changes = [change for change in self.changes if len(change)]
        for (tokens, features), change in zip(self.features(batch), changes, strict=True):
            output.index_add_(0, tokens, features @ change)
        return output


def joint_offsets(experts: PackedExperts, beside: BesideExperts | None) -> list[int]:
    """Where blocks start among all neurons: those of the experts, then those beside them, if there are any."""
    offsets = experts.offsets.tolist()
    for width in () if beside is None else beside.widths:
        if width:
            offsets.append(offsets[-1] + width)
    return offsets


def joint_down(experts: PackedExperts, beside: BesideExperts | None) -> Tensor:
    """The matrix that all features are multiplied with, (P + those beside, D)."""
    return experts.down if beside is None else torch.cat([experts.down, beside.change])


def with_joint_down(
    experts: PackedExperts, beside: BesideExperts | None, down: Tensor
) -> tuple[PackedExperts, BesideExperts | None]:
    """Both with what they have of another matrix of that kind, (P + those beside, D)."""
    experts = dataclasses.replace(experts, down=down[: experts.num_neurons])
    if beside is None:
        return experts, None
    return experts, dataclasses.replace(beside, change=down[experts.num_neurons :])
