"""Neurons by the second-order change of the loss that their removal causes."""

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..selection import SELECTION
from ..types import LayerStatistics


@SELECTION.register("atomic_experts", needs=("selection_count", "activation_energy", "neuron_gradient_energy"))
def saliency_of_atomic_experts(
    experts: PackedExperts,  # noqa: ARG001
    *,
    statistics: LayerStatistics,
    experts_kept: Tensor,
    expected: bool = False,
) -> Tensor:
    """Mean of a(x_t)^2 times mean of (gamma_t . down[:, a])^2 over an expert's routed tokens, (P,) float64.

    The score of HEAPr (Li et al., 2026, https://arxiv.org/abs/2509.22299), which takes activation and gradient for
    independent, as its code does. gamma_t = d loss / d f_i(x_t) holds the gate. Both are conditional means, so
    frequency drops out. Neurons of an expert that was never used have -1: they go first. The public code keeps a
    (D, D) matrix of each expert and ranks the neurons of all layers together; here (N, I) sums do, and layers keep
    equal shares.

    Args:
        experts: P neurons of M experts, with the last matrices that the statistics saw.
        statistics: Of the N original experts.
        experts_kept: Which of them the neurons are of, int64, I neurons each.
        expected: Multiply by the share of the tokens that reach the expert: the expected change of the loss.
    """
    count = statistics.selection_count[experts_kept].double()[:, None]
    energies = statistics["activation_energy"][experts_kept] * statistics["neuron_gradient_energy"][experts_kept]
    saliency = energies / count.clamp(min=1).square()
    if expected:
        saliency = saliency * count / max(1, statistics.num_tokens)
    return torch.where(count > 0, saliency, -1.0).flatten()
