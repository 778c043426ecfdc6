"""Neurons by what their removal costs when the other neurons of all experts of the layer make up for it."""

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..observation.gated_features import FeatureSums
from ..refit.least_squares import mean_energies
from ..selection import SELECTION
from .gated_obs import saliency_by_gated_obs


@SELECTION.register("joint_obs")
def order_by_joint_obs(
    experts: PackedExperts,
    *,
    grams: list[Tensor],
    sums: FeatureSums | None,
    budget: tuple[int, int],
    ridge: float = 1e-3,
    block: float = 0.05,
) -> Tensor:
    """Place of each neuron in the order of the Optimal Brain Surgeon on the features of all experts together.

    Starts from the down projections W that minimise sum |y - phi W|^2 + sum_e r_e |W_e - down_e|^2 with all neurons,
    phi being the gated features of all experts, y what the layer is to give, r_e `ridge` times the mean energy of the
    expert's features. Removing neuron a and refitting all the others then costs |W[a]|^2 / [H^-1]_aa with
    H = sum phi phi^T + r, after which W and H^-1 are updated (Hassibi & Stork, 1993, "Second order derivatives for
    network pruning"). Unlike in `gated_obs` other experts of a token make up for a neuron too, and what the layer is
    to give counts, not only what it gives; and no expert falls below its least width on the way.

    Neurons go in blocks: the cheapest `block` of those left, then the update. An expert that no token reached takes
    part with the Gram that stands for it in `grams`.

    Args:
        experts: P neurons of M experts.
        grams: For each expert the sum of phi phi^T, also where no token reached it.
        sums: Of the calibration tokens; None where P is too large for them: then the order of `gated_obs`.
        budget: (neurons that stay in all, neurons that each expert keeps at least).
        ridge: Relative, > 0. Ten times as large as often as the Gram is too imprecise for it.
        block: Share of the remaining neurons that go between two updates.

    Returns:
        (P,) float64: 0 for the neuron that goes first; those that stay come last. Time O(P^3), memory 24 P^2 bytes
        beside the sums.
    """
    if sums is None:
        return saliency_by_gated_obs(experts, grams=grams)
    gram, offsets = sums.gram.clone(), experts.offsets.tolist()
    for expert, of_expert in enumerate(grams):
        neurons = slice(offsets[expert], offsets[expert + 1])
        if not gram[neurons, neurons].any():
            gram[neurons, neurons] = of_expert
    damping = mean_energies(gram, offsets)
    down = experts.down.to(gram.dtype)
    if not damping.any():
        return saliency_by_gated_obs(experts, grams=grams)
    inverse = damped_inverse(gram, ridge * damping)
    # A Gram that stands for an expert adds nothing to what the layer is to give: the residual is of the real tokens.
    best = down + inverse @ (sums.cross - sums.gram @ down)
    order = elimination_order(inverse, best, experts.expert_of_neuron.to(down.device), budget, block)
    return torch.empty_like(damping).index_copy(0, order, torch.arange(len(order), device=order.device).to(down.dtype))


def damped_inverse(gram: Tensor, damping: Tensor) -> Tensor:
    """(gram + diag(damping))^-1, (P, P), with ten times the damping as often as it takes; damping (P,) > 0."""
    while True:
        damped = gram.clone()
        damped.diagonal().add_(damping)
        factor, is_singular = torch.linalg.cholesky_ex(damped)
        if not is_singular:
            return torch.cholesky_inverse(factor)
        damping = 10 * damping


def elimination_order(
    inverse: Tensor, down: Tensor, expert_of_neuron: Tensor, budget: tuple[int, int], block: float
) -> Tensor:
    """Neurons in the order in which they go, (P,) int64; those that stay come last, by what their removal would cost.

    Args:
        inverse: H^-1, (P, P).
        down: The best W with all neurons, (P, D).
        expert_of_neuron: (P,).
        budget: See `order_by_joint_obs`.
        block: In (0, 1].
    """
    num_kept, least = budget
    left, order = torch.arange(len(down), device=down.device), []
    while True:
        costs = down.square().sum(1) / inverse.diagonal()
        by_cost = costs.argsort(stable=True)
        number = min(len(left) - num_kept, max(1, int(len(left) * block)))
        free = by_cost[is_above(expert_of_neuron[left[by_cost]], least)][: max(0, number)]
        if not len(free):
            return torch.cat([*order, left[by_cost]])
        order.append(left[free])
        stays = torch.ones_like(left, dtype=torch.bool).index_fill(0, free, False).nonzero().flatten()
        coupling = inverse[stays[:, None], free]
        factor = torch.linalg.cholesky(inverse[free[:, None], free])
        down = down[stays] - coupling @ torch.cholesky_solve(down[free], factor)
        inverse = inverse[stays[:, None], stays] - coupling @ torch.cholesky_solve(coupling.T, factor)
        left = left[stays]


def is_above(experts: Tensor, least: int) -> Tensor:
    """Which neurons may go, (P,) bool, if each expert keeps its `least` last ones; `experts` in the order of going."""
    is_of_expert = torch.nn.functional.one_hot(experts)
    after = is_of_expert.flip(0).cumsum(0).flip(0).gather(1, experts[:, None]).flatten()  # itself included
    return after > least
