"""Match neurons by what they are and by what they do on the same tokens."""

from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..alignment import ALIGNMENT
from ..observation.expert_activations import CHECK_TOKENS, activations, sums_over_tokens
from ..observation.observed import sum_dtype
from ..option_checks import check_all, check_whole
from ..saliency.output_norms import gated_output_norm
from ..types import ExpertGroups, ExpertWeights, LayerStatistics

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens

CHECK_ALIGNMENT = check_all(check_whole("components", 1, "Leave it out for 64."), CHECK_TOKENS)


@ALIGNMENT.register(
    "weights_and_activations",
    needs=("selection_count", "gated_output_norm_sum"),
    check=CHECK_ALIGNMENT,
)
def align_by_weights_and_activations(
    weights: ExpertWeights,
    groups: ExpertGroups,
    *,
    tokens: "LayerTokens",
    statistics: LayerStatistics,
    components: int = 64,
    max_tokens: int = 32_768,
) -> Tensor:
    """Minimise the distance of every member's neurons to its dominant expert's, in activations and in weights.

    The alignment of REAM (https://arxiv.org/abs/2604.04356), after its public code: the cost of matching neuron a of
    the dominant expert with neuron b of the member is

        |A_r[a] - A_t[b]| + |P_r[a] - P_t[b]|

    where A are activations over the kept tokens and P the leading principal components of the neurons' weights (gate,
    up, down and biases side by side) scaled by the expert's saliency, both with rows of length 1. Deviations: the
    code draws other tokens for each expert, so that its activation distances compare different tokens; here all
    experts see the same ones, of those that the recipe kept. Whether its components are of two experts or
    of a layer is not known: here of the two.

    Memory: 8 m I^2 bytes for a group of m, and 8 min(2 I, 3 D)^2 for the components. Time: the activations of all
    members on these tokens, O(min(2 I, 3 D)^3) and O(I^3) for each member.

    Args:
        weights: All N experts.
        groups: Which expert leads which.
        tokens: The kept tokens.
        statistics: For the saliency, as in REAP; an expert that was never used is not scaled.
        components: How many principal components, at most as many as there are.
        max_tokens: How many of the kept tokens count, at even distances; 32,768 in the paper's code.

    Returns:
        `order` (N, I) int64 for `ExpertWeights.permute_neurons`: identity for dominant and dropped experts.
    """
    order = torch.arange(weights.width).repeat(weights.num_experts, 1)
    saliency = gated_output_norm(statistics, weights)
    scale = torch.where(saliency > 0, saliency / saliency.max(), 1.0).tolist()
    for group in range(groups.num_groups):
        dominant, *others = groups.members(group).tolist()
        if not others:
            continue
        of_activations = activation_distances(weights, dominant, others, tokens, max_tokens)
        reference = weights.neurons(dominant) * scale[dominant]
        for expert, cost in zip(others, of_activations, strict=True):
            pair = principal_components(reference, weights.neurons(expert) * scale[expert], components)
            cost = cost + unit_distances(*pair)
            order[expert] = torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])
    return order


def activation_distances(
    weights: ExpertWeights, dominant: int, others: list[int], tokens: "LayerTokens", max_tokens: int
) -> list[Tensor]:
    """Distances of normalised activations of the dominant expert (rows) and of each other, (I, I) float64."""

    def products(hidden_states: Tensor) -> tuple[Tensor, ...]:
        reference = activations(weights, dominant, hidden_states, tokens)
        members = [activations(weights, expert, hidden_states, tokens) for expert in others]
        squares = [activation.square().sum(dim=0) for activation in (reference, *members)]
        return (*squares, *(reference.T @ member for member in members))

    _, sums = sums_over_tokens(tokens, weights.up.device, max_tokens, products)
    if not sums:
        return [torch.zeros(weights.width, weights.width, device=weights.up.device)] * len(others)
    squares, inner = sums[: len(others) + 1], sums[len(others) + 1 :]
    return [distances(squares[0], of_member, both) for of_member, both in zip(squares[1:], inner, strict=True)]


def distances(squares: Tensor, others: Tensor, inner: Tensor) -> Tensor:
    """Distances of vectors with rows of length 1 from squared lengths (a,), (b,) and products (a, b).

    A vector of zeros stays one.
    """
    lengths = torch.outer(squares.sqrt(), others.sqrt())
    cosines = torch.where(lengths > 0, inner / torch.where(lengths > 0, lengths, 1.0), 0.0)
    ones = (squares > 0).to(inner.dtype)[:, None] + (others > 0).to(inner.dtype)
    return (ones - 2 * cosines).clamp_min(0).sqrt()


def unit_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Distances between two sets of vectors (a, r) and (b, r) after each was given length 1."""
    return distances(rows.square().sum(dim=1), others.square().sum(dim=1), rows @ others.T)


def principal_components(rows: Tensor, others: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Coordinates of two sets of vectors in the leading principal components of both together, float64.

    From the smaller one of the two Gram matrices; a component's sign is free, distances do not depend on it.
    """
    both = torch.cat([rows, others]).to(sum_dtype(rows.device))
    centred = both - both.mean(dim=0)
    components = min(components, *centred.shape)
    if centred.shape[0] <= centred.shape[1]:
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        scores = vectors[:, -components:] * values[-components:].clamp_min(0).sqrt()
    else:
        scores = centred @ torch.linalg.eigh(centred.T @ centred)[1][:, -components:]
    return scores[: len(rows)], scores[len(rows) :]
