"""Neurons by the energy of what they add to the layer's output."""

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..selection import SELECTION


@SELECTION.register("gated_energy")
def saliency_by_gated_energy(experts: PackedExperts, *, grams: list[Tensor]) -> Tensor:
    """Sum over the calibration tokens of |phi_t[a] down[a]|^2, phi = gate weight times activation.

    The l2 part of the score of CAMERA-P (micro-expert pruning, 2025): what is lost when a neuron is removed and
    nothing makes up for it.

    Args:
        experts: P neurons of M experts.
        grams: For each expert the sum of phi phi^T, (width, width) float64.

    Returns:
        (P,) float64.
    """
    energy = torch.cat([gram.diagonal() for gram in grams])
    return energy * experts.down.to(energy.dtype).square().sum(1)
