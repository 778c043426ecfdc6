"""Permute and least squares, layer by layer, inside a group."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..merging import MERGING
from ..observation.expert_activations import MAX_TOKENS
from ..solvers.down_fit import CHECK_FIT, RIDGE, fit_down, shares_of, weighted_mean
from ..types import ExpertWeights

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens


@MERGING.register("pleas", takes="experts", check=CHECK_FIT)
def merge_by_permuted_least_squares(
    members: ExpertWeights,
    importance: Tensor,
    *,
    tokens: "LayerTokens",
    ridge: float = RIDGE,
    max_tokens: int = MAX_TOKENS,
) -> ExpertWeights:
    """Fit each matrix of the merged expert to what the permuted members give for averaged inputs.

    PLeaS (Nasery et al., 2024, https://arxiv.org/abs/2407.02447) with an expert as a model of two layers. A matrix W
    of the result minimises sum_t |W z_t - sum_i s_i W_i z_ti|^2, where z_ti is what permuted member i feeds into the
    layer, z_t = sum_i s_i z_ti and s are shares of the importance. All members of a group have the same input, so
    gate and up are exactly the weighted means; down is a regression on the averaged activations. Not possible here:
    a partial width, for which PLeaS keeps the units that match badly apart; all experts of a layer are equally wide,
    so all units are merged. What is fed into down later is act(mean gate, mean up), not the mean of activations:
    `least_squares_down` fits that instead.

    Memory and time: see `fit_down`.

    Args:
        members: (m, ...) float32, permuted: use an alignment.
        importance: (m,), >= 0. All 0 counts the dominant expert alone.
        tokens: The kept tokens of the layer.
        ridge: Relative to the mean energy of an averaged neuron; 0 is the pseudo-inverse.
        max_tokens: How many of the kept tokens count, at even distances.

    Returns:
        One expert, float32. Biases are averaged.
    """
    mean = weighted_mean(members, importance)
    shares = shares_of(importance, members.up.device).tolist()

    def averaged(hidden_states: Tensor, of_members: list[Tensor]) -> Tensor:
        return sum(share * activation for share, activation in zip(shares, of_members, strict=True))

    return fit_down(mean, members, importance, tokens, ridge, max_tokens, averaged)
