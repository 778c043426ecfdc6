"""Neurons by the sum and the peak of what they add to the layer's output."""

from typing import Any

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..selection import SELECTION
from ..types import LayerStatistics


def check(options: dict[str, Any]) -> None:
    """Raise ValueError for an `alpha` that is not in [0, 1]."""
    alpha = options["alpha"]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha of selection 'micro_expert_energy' is {alpha!r}, it must be in [0, 1]: the share of the peak. "
            "Leave it out for 0.9."
        )


@SELECTION.register("micro_expert_energy", needs=("gated_activation_energy", "gated_activation_peak"), check=check)
def saliency_by_micro_expert_energy(
    experts: PackedExperts, *, statistics: LayerStatistics, experts_kept: Tensor, alpha: float = 0.9
) -> Tensor:
    """((1 - alpha) sum_t phi_t^2 + alpha max_t phi_t^2) |down[a]|^2 with phi_t = g_t a(x_t), (P,) float64.

    The score of CAMERA-P (Xu et al., 2025, https://arxiv.org/abs/2508.02322), by its code and summaries; its script
    has alpha = 0.9. It holds gate and frequency, being a sum. Public code fixes k = 8 for one family; here the gates
    are those of the model. Neurons of shared experts, which the paper ranks too, stay. An expert that is the merge of
    several counts with the activations of its leader; neurons of a union with those of the member that they are from,
    under its own gate, and with their share of the output.

    Args:
        experts: P neurons of M experts.
        statistics: Of the N original experts.
        experts_kept: Which of them the neurons are of, int64, I neurons each.
        alpha: Share of the peak, in [0, 1].
    """
    energy, peak = (statistics[name][experts_kept] for name in ("gated_activation_energy", "gated_activation_peak"))
    return ((1 - alpha) * energy + alpha * peak).flatten() * norms_of_neurons(experts)


def norms_of_neurons(experts: PackedExperts) -> Tensor:
    """|down[a]|^2 of each neuron, (P,) float64 on the CPU, where statistics are."""
    return experts.down.cpu().to(torch.float64).square().sum(1)
