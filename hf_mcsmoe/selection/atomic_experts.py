"""Neurons by the second-order change of the loss that their removal causes."""

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..selection import SELECTION
from ..types import LayerStatistics

NEEDS = ("selection_count", "gradient_count", "activation_energy", "neuron_gradient_energy")


@SELECTION.register("atomic_experts", needs=NEEDS)
def saliency_of_atomic_experts(
    experts: PackedExperts, *, statistics: LayerStatistics, experts_kept: Tensor, expected: bool = False
) -> Tensor:
    """Mean of a(x_t)^2 times mean of (gamma_t . down[:, a])^2 over an expert's routed tokens, (P,) float64.

    The score of HEAPr (Li et al., 2026, https://arxiv.org/abs/2509.22299), which takes activation and gradient for
    independent, as its code does. gamma_t = d loss / d f_i(x_t) holds the gate. Both are conditional means, so
    frequency drops out: that of a^2 over all tokens, that of the gradients over the recipe's `gradient_tokens`. An
    expert that only other tokens reach takes its gradients to be as long as the layer's are on average, and alike in
    all directions. Neurons of an expert that was never used have -1: they go first. The public code runs all tokens
    backward, keeps a (D, D) matrix of each expert and ranks the neurons of all layers together; here (N, I) sums do,
    and layers keep equal shares.

    Args:
        experts: P neurons of M experts, with the last matrices that the statistics saw.
        statistics: Of the N original experts.
        experts_kept: Which of them the neurons are of, int64, I neurons each.
        expected: Multiply by the share of the tokens that reach the expert: the expected change of the loss.
    """
    count = statistics.selection_count[experts_kept].double()[:, None]
    saliency = statistics["activation_energy"][experts_kept] / count.clamp(min=1)
    saliency = saliency * mean_gradient_energies(experts, statistics, experts_kept)
    if expected:
        saliency = saliency * count / max(1, statistics.num_tokens)
    return torch.where(count > 0, saliency, -1.0).flatten()


def mean_gradient_energies(experts: PackedExperts, statistics: LayerStatistics, experts_kept: Tensor) -> Tensor:
    """Means of (gamma_t . down[:, a])^2 over the tokens of each expert whose gradients were taken, (M, I) float64."""
    count = statistics["gradient_count"][experts_kept].double()[:, None]
    energies = statistics["neuron_gradient_energy"][experts_kept]
    lengths = experts.down.double().square().sum(1).cpu().reshape(energies.shape)
    total = (count * lengths).sum()
    of_unit = energies.sum() / total if total > 0 else 0.0  # gamma^2 in one direction
    return torch.where(count > 0, energies / count.clamp(min=1), of_unit * lengths)
