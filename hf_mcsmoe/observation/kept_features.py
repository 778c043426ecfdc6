"""The features of a layer's experts on its kept tokens, computed once for all steps that read them."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from .gated_features import Activation, features_in_chunks
from .token_batches import RoutedTokens

MOST_BYTES = 2**29  # of the features of one layer; where they take more, every pass computes them anew


class KeptFeatures:
    """Iterates over what `features_in_chunks` gives; from the second pass on from memory, where there is room.

    Memory: 4 bytes for each token and neuron of its experts, 4 T k I, or one chunk of that above `MOST_BYTES`.

    Args:
        experts: M experts; `down` is not read.
        activation: From `MoeFamily.activation`.
        batches: Tokens; `targets` are not read.
    """

    def __init__(self, experts: PackedExperts, activation: Activation, batches: Iterable[RoutedTokens]):
        self.experts, self.activation, self.batches = experts, activation, list(batches)
        self._held: list[list[tuple[Tensor, Tensor]]] | None = None

    def __iter__(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        if self._held is None:
            found = features_in_chunks(self.experts, self.activation, self.batches)
            if self.num_bytes > MOST_BYTES:
                return found
            self._held = list(found)
        return iter(self._held)

    @property
    def num_bytes(self) -> int:
        """What all features take."""
        tokens = torch.zeros(self.experts.num_experts, dtype=torch.int64)
        for batch in self.batches:
            tokens += batch.gates.count_nonzero(0).cpu()
        return 4 * int(tokens @ self.experts.widths.cpu())

    def serves(self, experts: PackedExperts, batches: list[RoutedTokens]) -> bool:
        """Whether these would be the features of other experts on other batches, up to the targets."""
        names = [name for name in self.experts.tensors() if not name.startswith("down")]
        ours, theirs = self.experts.tensors(), experts.tensors()
        if names != [name for name in theirs if not name.startswith("down")]:
            return False
        pairs = [(self.experts.offsets, experts.offsets), *((ours[name], theirs[name]) for name in names)]
        if len(self.batches) != len(batches):
            return False
        for mine, other in zip(self.batches, batches, strict=True):
            pairs += [(mine.hidden_states, other.hidden_states), (mine.gates, other.gates)]
        return all(a is b or (a.device == b.device and torch.equal(a, b)) for a, b in pairs)

    def of_neurons(self, kept: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The same for some of the neurons, (P',) int64 ascending."""
        experts = self.experts.expert_of_neuron.to(kept.device)[kept]
        places = kept - self.experts.offsets.to(kept.device)[experts]
        places = places.split(experts.bincount(minlength=self.experts.num_experts).tolist())
        for found in self:
            yield [(tokens, f.index_select(1, p)) for (tokens, f), p in zip(found, places, strict=True)]
