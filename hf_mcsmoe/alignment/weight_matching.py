"""Put each expert's neurons in the order that best matches its dominant expert's."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..alignment import ALIGNMENT
from ..types import ExpertGroups, ExpertWeights


@ALIGNMENT.register("weight_matching")
def align_by_weight_matching(weights: ExpertWeights, groups: ExpertGroups) -> Tensor:
    """Minimise the Frobenius distance of every member to its dominant expert over neuron orders.

    Permutation alignment of M-SMoE (Li et al., 2024, section 3.1, https://arxiv.org/abs/2310.01334), after Git
    Re-Basin. An expert has one hidden layer, so one linear sum assignment of

        C[a, b] = <gate_r[a], gate_t[b]> + <up_r[a], up_t[b]> + <down_r[:, a], down_t[:, b]>

    is exact; squared norms are constant over orders and drop out. Deviations from the public code: members
    are aligned to their own dominant expert instead of expert 0 of the layer (never worse for the merge,
    the same number of assignments); gated experts are aligned too; biases of neurons take part in C.

    Args:
        weights: All N experts.
        groups: Which expert leads which.

    Returns:
        `order` (N, I) int64 for `ExpertWeights.permute_neurons`: identity for dominant and dropped experts.
        O(I^2) memory and O(I^3) time at worst for each member, on the CPU.
    """
    order = torch.arange(weights.width).repeat(weights.num_experts, 1)
    for group in range(groups.num_groups):
        dominant, *others = groups.members(group).tolist()
        if not others:
            continue
        reference = weights.neurons(dominant)
        for expert in others:
            gain = reference @ weights.neurons(expert).T  # (I, I)
            _, column = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
            order[expert] = torch.from_numpy(column)
    return order
