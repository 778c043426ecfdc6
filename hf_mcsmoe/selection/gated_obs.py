"""Neurons by what their removal costs when the other neurons of their expert make up for it."""

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..selection import SELECTION


@SELECTION.register("gated_obs")
def saliency_by_gated_obs(
    experts: PackedExperts, *, grams: list[Tensor], ridge: float = 3e-3, block: float = 0.05
) -> Tensor:
    """Cost of removing each neuron in the order of the Optimal Brain Surgeon, on gated features.

    The output of expert e is phi down with phi = gate weight times activation. Removing neuron a and refitting the
    others costs, in squared output error over the calibration tokens,

        |down[a]|^2 / [H^-1]_aa,    H = sum of phi phi^T + ridge * mean(diagonal) * I,

    after which `down` and H^-1 are updated (Hassibi & Stork, 1993, "Second order derivatives for network pruning").
    Neurons go in blocks: the cheapest `block` of those left, then the update. A neuron's saliency is the cost of its
    own removal after all that went before it, made increasing, so the most salient neurons of all experts together,
    for any budget, are what the elimination leaves in each.

    The gates make costs of different experts of a layer comparable. Products of neurons of different experts are
    left out, because an expert's own Gram is all that has to be kept and inverted: N matrices (I, I) instead of one
    (N I, N I). What that loses is measured in examples/benchmarks/fidelity.py; the refit afterwards is joint.

    Args:
        experts: P neurons of M experts.
        grams: For each expert the sum of phi phi^T, (width, width) float64.
        ridge: Relative to the mean energy of the expert's neurons. Where that is all but 0 neurons rank by their
            |down|^2, behind those of any other expert. Ten times as large as often as the Gram, whose products are
            float32, is too imprecise for it.
        block: Share of an expert's remaining neurons that go between two updates.

    Returns:
        (P,) float64, >= 0: squared output error. Time O(I^3), memory O(I^2) for each expert.
    """
    energies = torch.stack([gram.diagonal().sum() / max(1, len(gram)) for gram in grams])
    mean = energies.mean()
    least = torch.where(mean > 0, mean * SILENT, 1)  # without any energy all neurons rank by |down|^2
    offsets = experts.offsets.tolist()
    saliency = grams[0].new_zeros(experts.num_neurons)
    for expert, gram in enumerate(grams):
        neurons = slice(offsets[expert], offsets[expert + 1])
        if neurons.start == neurons.stop:
            continue
        damping = ridge * torch.maximum(energies[expert], least)
        saliency[neurons] = removal_costs(inverse_of(gram, damping), experts.down[neurons].to(gram.dtype), block)
    return saliency


# Energy of an expert that never answers, relative to the mean of all: small beside any that does.
SILENT = 1e-6


def inverse_of(gram: Tensor, damping: Tensor) -> Tensor:
    """(gram + damping I)^-1, (I, I), with ten times the damping as often as it takes; damping > 0."""
    while True:
        factor, is_singular = torch.linalg.cholesky_ex(gram + torch.diag(damping.expand(len(gram))))
        if not is_singular:
            return torch.cholesky_inverse(factor)
        damping = 10 * damping


def removal_costs(inverse: Tensor, down: Tensor, block: float) -> Tensor:
    """Cost of each neuron's removal after those that are cheaper, (I,); see `saliency_by_gated_obs`.

    Args:
        inverse: H^-1, (I, I) positive definite.
        down: (I, D).
        block: In (0, 1].
    """
    order = elimination_order(inverse.clone(), down.clone(), block)
    # Removing a set R costs |L^-1 down_R|^2 with L L^T = [H^-1]_RR; one factorization gives every nested set.
    factor = torch.linalg.cholesky(inverse[order[:, None], order])
    costs = torch.linalg.solve_triangular(factor, down[order], upper=False).square().sum(1)
    return torch.empty_like(costs).index_copy(0, order, increasing(costs))


def increasing(costs: Tensor) -> Tensor:
    """Largest cost so far, (I,); where that stays the same it grows by a unit in the last place each time.

    So what goes later is more salient: equal costs would be told apart by the place of the neuron in its expert.
    """
    largest, place = costs.cummax(0)[0], torch.arange(len(costs), device=costs.device)
    is_new = largest.diff(prepend=largest.new_full((1,), -1.0)) > 0
    start_of_run = torch.where(is_new, place, 0).cummax(0)[0]
    steps = (place - start_of_run).to(largest.dtype)
    return largest * (1 + steps * torch.finfo(largest.dtype).eps)


def elimination_order(inverse: Tensor, down: Tensor, block: float) -> Tensor:
    """Neurons in the order in which they go, cheapest first, (I,) int64; destroys its arguments."""
    left = torch.arange(len(down), device=down.device)
    order = []
    while left.numel() > 1:
        costs = down.square().sum(1) / inverse.diagonal()
        number = min(left.numel() - 1, max(1, int(left.numel() * block)))
        chosen = costs.argsort(stable=True)
        gone, stays = chosen[:number], chosen[number:].sort().values
        order.append(left[gone])
        coupling = inverse[stays[:, None], gone]
        factor = torch.linalg.cholesky(inverse[gone[:, None], gone])
        down = down[stays] - coupling @ torch.cholesky_solve(down[gone], factor)
        inverse = inverse[stays[:, None], stays] - coupling @ torch.cholesky_solve(coupling.T, factor)
        left = left[stays]
    return torch.cat([*order, left])
