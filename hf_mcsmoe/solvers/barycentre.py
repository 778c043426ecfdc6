"""The mean of experts whose neurons are put in the order that brings them closest to it."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..types import ExpertWeights, permute


def align_to_barycentre(weights: ExpertWeights, shares: Tensor, first: int, iterations: int) -> Tensor:
    """Neuron orders that minimise sum_i shares_i |P_i D_i - B|_F^2 over orders P_i and the base B; a local minimum.

    D_i has one row for each neuron of expert i: its rows of gate and up, its column of down, its biases. The
    Wasserstein barycentre of ResMoE (Ai et al., 2025, https://arxiv.org/abs/2503.06881) for experts that all have I
    neurons of the same weight. Alternates B = sum_i shares_i P_i D_i with one linear sum assignment for each expert;
    neither step raises the sum. How the neurons of the experts were ordered only matters for the order of the result.

    Args:
        weights: All N experts.
        shares: (N,), >= 0, sum 1.
        first: The expert that B is at the start.
        iterations: Assignments of all experts, at most; 0 leaves all neurons as they are. It ends where no neuron
            changes its place.

    Returns:
        `order` (N, I) int64 for `ExpertWeights.permute_neurons`. A float32 copy of the experts and O(I^2) memory;
        O(I^3) time at worst for each expert and iteration, on the CPU.
    """
    order = None
    neurons = [weights.neurons(expert) for expert in range(weights.num_experts)]
    base = neurons[first]
    for _ in range(iterations):
        new = torch.stack([match(base, of_expert) for of_expert in neurons])
        if order is not None and torch.equal(new, order):
            break
        order = new
        base = torch.zeros_like(base)
        for of_expert, share, places in zip(neurons, shares.tolist(), order, strict=True):
            base.add_(of_expert.index_select(0, places.to(base.device)), alpha=share)
    return order if order is not None else torch.arange(weights.width).repeat(weights.num_experts, 1)


def match(base: Tensor, neurons: Tensor) -> Tensor:
    """Which of `neurons` (I, F) stands where, so that they are closest to `base` (I, F): (I,) int64."""
    gain = base @ neurons.T
    _, column = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(column)


def mean_of_aligned(weights: ExpertWeights, order: Tensor, shares: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each matrix (the weighted mean of all experts (O, I), all experts (N, O, I)), neurons in order.

    The mean is summed in float32 and rounded to the dtype of the weights, in which it will be stored.
    """
    found = {}
    for name, tensor in weights.tensors().items():
        if not name.endswith("_bias"):
            aligned = permute(name, tensor, order)
            mean = torch.einsum("n,noi->oi", shares.to(tensor.device, torch.float32), aligned.float())
            found[name] = (mean.to(tensor.dtype), aligned)
    return found


def biases_in_order(weights: ExpertWeights, order: Tensor) -> dict[str, Tensor]:
    """The biases of all experts by matrix, neurons in order; empty without biases."""
    tensors = weights.tensors().items()
    return {name.removesuffix("_bias"): permute(name, t, order) for name, t in tensors if name.endswith("_bias")}
