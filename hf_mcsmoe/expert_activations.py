"""What experts make of the kept tokens of their layer, all on the same ones, wherever the router sent these."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from .gated_features import in_chunks
from .observed import sum_dtype
from .types import ExpertWeights

if TYPE_CHECKING:
    from .layer_tokens import LayerTokens


def activations(weights: ExpertWeights, expert: int, hidden_states: Tensor, tokens: "LayerTokens") -> Tensor:
    """What `down` of one expert is multiplied with, (t, I) float32.

    Args:
        weights: Of experts.
        expert: Which of them.
        hidden_states: (t, D) float32.
        tokens: For the function between the matrices.
    """

    def project(name: str) -> Tensor | None:
        matrix, bias = getattr(weights, name), getattr(weights, f"{name}_bias")
        if matrix is None:
            return None
        return linear(hidden_states, matrix[expert].float(), bias[expert].float() if bias is not None else None)

    return tokens.activation(project("up"), project("gate"))


def hidden_states_of(tokens: "LayerTokens", device: torch.device) -> Iterator[Tensor]:
    """The kept tokens, (t, D) float32 at a time."""
    for batch in in_chunks(tokens.calibration):
        yield batch.hidden_states.to(device).float()


@torch.no_grad()
def sums_over_tokens(
    tokens: "LayerTokens", device: torch.device, terms: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[int, list[Tensor]]:
    """(number of kept tokens, sums over them of what `terms` gives for some of them); products float32, sums float64.

    Args:
        tokens: The kept tokens.
        device: Where to compute.
        terms: From hidden states (t, D) to tensors that are added up.
    """
    sums: list[Tensor] = []
    num_tokens = 0
    for hidden_states in hidden_states_of(tokens, device):
        num_tokens += len(hidden_states)
        found = [term.to(sum_dtype(device)) for term in terms(hidden_states)]
        sums = [total + more for total, more in zip(sums, found, strict=True)] if sums else found
    return num_tokens, sums
