"""Mean inner matrices, and the down projection that fits them best."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..merging import MERGING
from ..observation.expert_activations import MAX_TOKENS, activations
from ..solvers.down_fit import CHECK_FIT, RIDGE, fit_down, weighted_mean
from ..types import ExpertWeights

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens


@MERGING.register("least_squares_down", takes="experts", check=CHECK_FIT)
def merge_by_least_squares_down(
    members: ExpertWeights,
    importance: Tensor,
    *,
    tokens: "LayerTokens",
    ridge: float = RIDGE,
    max_tokens: int = MAX_TOKENS,
) -> ExpertWeights:
    """Average gate and up, then fit down to the members' mean output on the tokens of the layer.

    MergeMoE (2025, https://arxiv.org/abs/2510.14436): with shares s_i of the importance,

        W_g = sum_i s_i W_g^i,  W_u = sum_i s_i W_u^i,  P = act(W_g X, W_u X),  Q_i = act(W_g^i X, W_u^i X)
        W_d = [s_1 W_d^1 ... s_m W_d^m] Q P^+

    X are kept tokens, whatever expert the router chose for them. Deviation: the paper's P^+ has no ridge and
    collapses on few samples; here a ridge draws W_d to the weighted mean of the W_d^i unless it is 0.

    Memory and time: see `fit_down`.

    Args:
        members: (m, ...) float32; unaligned in the paper, which makes P a poor basis: an alignment is an option.
        importance: (m,), >= 0. All 0 counts the dominant expert alone.
        tokens: The kept tokens of the layer.
        ridge: Relative to the mean energy of a neuron of P; 0 is the pseudo-inverse, as published.
        max_tokens: How many of the kept tokens count, at even distances.

    Returns:
        One expert, float32. Biases are averaged; that of down is exact.
    """
    mean = weighted_mean(members, importance)
    return fit_down(
        mean, members, importance, tokens, ridge, max_tokens, lambda hidden, _: activations(mean, 0, hidden, tokens)
    )
