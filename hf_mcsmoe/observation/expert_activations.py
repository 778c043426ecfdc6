"""What experts make of the kept tokens of their layer, all on the same ones, wherever the router sent these."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..option_checks import check_whole
from ..types import ExpertWeights
from .observed import sum_dtype
from .token_batches import in_chunks

if TYPE_CHECKING:
    from .layer_tokens import LayerTokens

# Kept tokens that go through all members of a group in a merge: as many as statistics of every expert take.
MAX_TOKENS = 4096
CHECK_TOKENS = check_whole("max_tokens", 1, "The recipe's fit_tokens bound it too.")


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


def hidden_states_of(tokens: "LayerTokens", device: torch.device, most: int) -> Iterator[Tensor]:
    """The kept tokens, (t, D) float32 at a time; where there are more than `most`, that many at even distances."""
    total = sum(len(batch.gates) for batch in tokens.calibration)
    places = torch.arange(min(most, total)) * total // max(1, min(most, total))
    start = 0
    for batch in in_chunks(tokens.calibration):
        stop = start + len(batch.gates)
        taken = places[(places >= start) & (places < stop)] - start
        yield batch.hidden_states[taken.to(batch.hidden_states.device)].to(device).float()
        start = stop


@torch.no_grad()
def sums_over_tokens(
    tokens: "LayerTokens", device: torch.device, most: int, terms: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[int, list[Tensor]]:
    """(number of tokens, sums over them of what `terms` gives for some of them); products float32, sums float64.

    Args:
        tokens: The kept tokens.
        device: Where to compute.
        most: How many of them count, at even distances.
        terms: From hidden states (t, D) to tensors that are added up.
    """
    sums: list[Tensor] = []
    num_tokens = 0
    for hidden_states in hidden_states_of(tokens, device, most):
        num_tokens += len(hidden_states)
        found = [term.to(sum_dtype(device)) for term in terms(hidden_states)]
        sums = [total + more for total, more in zip(sums, found, strict=True)] if sums else found
    return num_tokens, sums
