"""What tokens that took no part in a fit say of down projections."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from .beside_experts import BesideExperts, joint_offsets
from .gated_features import Activation, add_outputs, output_of_biases
from .kept_features import KeptFeatures
from .observed import sum_dtype
from .token_batches import RoutedTokens, in_chunks

EVERY = slice(None)


class HeldOutError:
    """Squared error of the output of experts on some tokens, for any down projections.

    Products are float32, sums over tokens float64 (float32 where the device has no float64). Time of one call: that
    of the down projections on these tokens, T k I D; it needs no Gram matrix.

    Memory: `KeptFeatures`, the features of `beside`, and D numbers for each token.

    Args:
        experts: Their inner matrices; `down` is not read, `down_bias` counts as fixed.
        activation: From `MoeFamily.activation`.
        tokens: With targets.
        beside: More blocks of features after those of the experts.
    """

    def __init__(
        self,
        experts: PackedExperts,
        activation: Activation,
        tokens: list[RoutedTokens],
        beside: BesideExperts | None = None,
    ):
        self.experts, self.features = experts, KeptFeatures(experts, activation, tokens)
        self.targets, device = [], experts.up.device
        self.offsets, self.beside = joint_offsets(experts, beside), []
        for batch in in_chunks(tokens):
            constant = output_of_biases(experts, batch.gates.to(device))
            targets = batch.targets.to(device).float()
            self.targets.append(targets if constant is None else targets - constant)
            self.beside.append([] if beside is None else beside.features(batch))
        self.energy = self._sum_of_squares(self.targets)

    def __call__(self, down: Tensor, columns: slice = EVERY) -> float:
        """Sum over the tokens of |y - phi down|^2 for some columns of a `down`, (P, C), with rows for `beside`."""
        down, chunks = down.float(), zip(self.features, self.beside, self.targets, strict=True)
        return self._sum_of_squares(
            add_outputs(down, self.offsets, [*found, *beside], -y[:, columns]) for found, beside, y in chunks
        )

    def relative(self, down: Tensor) -> float | None:
        """The same over the energy of the targets; None without tokens or where the targets are all zero."""
        return self(down) / self.energy if self.energy > 0 else None

    def _sum_of_squares(self, values: Iterable[Tensor]) -> float:
        device = self.experts.up.device
        total = torch.zeros((), dtype=sum_dtype(device), device=device)
        for value in values:
            total += value.to(total.dtype).square().sum()
        return total.item()
