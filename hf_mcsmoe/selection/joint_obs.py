"""Neurons by what their removal costs when the other neurons of all experts of the layer make up for it."""

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..observation.gated_features import FeatureSums
from ..refit.least_squares import mean_energies
from ..selection import SELECTION
from .gated_obs import LEAST_IN_FLOAT32, saliency_by_gated_obs


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
        (P,) float64: 0 for the neuron that goes first; those that stay come last. Factors are float64, inverse and
        elimination float32 from a `ridge` of `LEAST_IN_FLOAT32` on: that changes the problem by far less than the
        ridge does. Time O(P^3), memory 24 P^2 bytes beside the sums.
    """
    found = joint_removals(experts, grams, sums, budget, ridge, block)
    if found is None:
        return saliency_by_gated_obs(experts, grams=grams)
    order, _ = found
    places = torch.arange(len(order), device=order.device).to(sums.gram.dtype)
    return torch.empty_like(places).index_copy(0, order, places)


def joint_removals(
    experts: PackedExperts,
    grams: list[Tensor],
    sums: FeatureSums | None,
    budget: tuple[int, int],
    ridge: float,
    block: float,
) -> tuple[Tensor, Tensor] | None:
    """In which order neurons go and what each removal costs, see `elimination`; arguments of `order_by_joint_obs`.

    None where there are no sums, or no token gave a feature.
    """
    if sums is None:
        return None
    gram, offsets = sums.gram.clone(), experts.offsets.tolist()
    for expert, of_expert in enumerate(grams):
        neurons = slice(offsets[expert], offsets[expert + 1])
        if not gram[neurons, neurons].any():
            gram[neurons, neurons] = of_expert
    damping = mean_energies(gram, offsets)
    down = experts.down.to(gram.dtype)
    if not damping.any():
        return None
    factor = damped_factor(gram, ridge * damping)
    # A Gram that stands for an expert adds nothing to what the layer is to give: the residual is of the real tokens.
    best = down + torch.cholesky_solve(sums.cross - sums.gram @ down, factor)
    how = experts.expert_of_neuron.to(down.device), budget, block
    if ridge >= LEAST_IN_FLOAT32:
        unit = damping.mean()  # so that numbers are near 1
        try:
            order, costs = elimination(inverse_of((factor / unit.sqrt()).float()), best.float(), *how)
            return order, costs.to(gram.dtype) * unit
        except torch.linalg.LinAlgError:  # these features ask for more precision
            pass
    return elimination(inverse_of(factor), best, *how)


def damped_factor(gram: Tensor, damping: Tensor) -> Tensor:
    """L with L L^T = gram + diag(damping), damping (P,) > 0, or with ten times that as often as it takes; (P, P)."""
    while True:
        damped = gram.clone()
        damped.diagonal().add_(damping)
        factor, is_singular = torch.linalg.cholesky_ex(damped)
        if not is_singular:
            return factor
        damping = 10 * damping


def inverse_of(factor: Tensor) -> Tensor:
    """(L L^T)^-1, (P, P), in less than half the time of `cholesky_inverse` where P is large."""
    return torch.cholesky_solve(torch.eye(len(factor), dtype=factor.dtype, device=factor.device), factor)


def elimination(
    inverse: Tensor, down: Tensor, expert_of_neuron: Tensor, budget: tuple[int, int], block: float
) -> tuple[Tensor, Tensor]:
    """The order in which neurons go, and what that costs.

    Args:
        inverse: H^-1, (P, P).
        down: The best W with all neurons, (P, D).
        expert_of_neuron: (P,).
        budget: See `order_by_joint_obs`.
        block: In (0, 1].

    Returns:
        All neurons, (P,) int64, those that stay last, by what their removal would cost; and for each of the r that go
        how much its removal, after those before it and with a refit of all that are left, raises the minimum of the
        ridge problem, (r,). So the sums of the first ones are exact for any number of neurons, blocks or not.
    """
    num_kept, least = budget
    left, order, costs = torch.arange(len(down), device=down.device), [], []
    while True:
        by_cost = (down.square().sum(1) / inverse.diagonal()).argsort(stable=True)
        number = min(len(left) - num_kept, max(1, int(len(left) * block)))
        free = by_cost[is_above(expert_of_neuron[left[by_cost]], least)][: max(0, number)]
        if not len(free):
            return torch.cat([*order, left[by_cost]]), torch.cat([down.new_empty(0), *costs])
        order.append(left[free])
        stays = torch.ones_like(left, dtype=torch.bool).index_fill(0, free, False).nonzero().flatten()
        # Removing a set R costs |L^-1 down_R|^2 with L L^T = [H^-1]_RR, and its first rows what the first ones cost.
        of_free = inverse.index_select(0, free)
        factor = torch.linalg.cholesky(of_free.index_select(1, free))
        change = torch.linalg.solve_triangular(factor, down[free], upper=False)
        coupling = torch.linalg.solve_triangular(factor, of_free.index_select(1, stays), upper=False)
        costs.append(change.square().sum(1))
        down = down[stays].addmm_(coupling.T, change, alpha=-1)
        inverse = inverse.index_select(0, stays).index_select(1, stays).addmm_(coupling.T, coupling, alpha=-1)
        left = left[stays]


def is_above(experts: Tensor, least: int) -> Tensor:
    """Which neurons may go, (P,) bool, if each expert keeps its `least` last ones; `experts` in the order of going."""
    is_of_expert = torch.nn.functional.one_hot(experts)
    after = is_of_expert.flip(0).cumsum(0).flip(0).gather(1, experts[:, None]).flatten()  # itself included
    return after > least
