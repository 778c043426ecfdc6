"""How strongly the neurons of experts answer, as the layer's output sees them."""

from torch import Tensor

from ..observation.observed import ExpertTokens
from ..statistics import STATISTICS


@STATISTICS.register("gated_activation_energy", of="expert")
def gated_activation_energy(routed: ExpertTokens) -> Tensor:
    """Sum over the routed tokens of (g_t a_i(x_t))^2, neuron by neuron, (N, I). Memory: 8 N I bytes."""
    return gated_squares(routed).sum(0)


@STATISTICS.register("gated_activation_peak", of="expert", combine="max")
def gated_activation_peak(routed: ExpertTokens) -> Tensor:
    """Largest (g_t a_i(x_t))^2 over the routed tokens for each neuron, (N, I); 0 without any. Memory: 8 N I bytes."""
    squares = gated_squares(routed)
    return squares.amax(0) if len(squares) else squares.new_zeros(squares.shape[1])


def gated_squares(routed: ExpertTokens) -> Tensor:
    """(g_t a_i(x_t))^2, (t, I)."""
    return (routed.gates[:, None] * routed.activations).square()
