"""Neurons by what their removal costs when the other neurons of their expert make up for it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..selection import SELECTION

# Energy of an expert that never answers, relative to the mean of all: small beside any that does.
SILENT = 1e-6

# Ridge from which on the elimination is float32: the condition of a damped Gram is at most its width over the ridge.
LEAST_IN_FLOAT32 = 1e-3

MOST_NUMBERS = 2**21  # of matrices (I, I) and (I, D) of the experts that are eliminated together: what a cache holds


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
        (P,) float64, >= 0: squared output error. Grams are inverted in float64; the elimination is float32 from a
        `ridge` of `LEAST_IN_FLOAT32` on. Time O(I^3) for each expert; memory O(I^2 + I D) for one, or for as
        many as have `MOST_NUMBERS` together.
    """
    energies = torch.stack([gram.diagonal().sum() / max(1, len(gram)) for gram in grams])
    mean = energies.mean()
    least = torch.where(mean > 0, mean * SILENT, 1)  # without any energy all neurons rank by |down|^2
    energies = torch.maximum(energies, least)
    offsets, saliency = experts.offsets.tolist(), grams[0].new_zeros(experts.num_neurons)
    for members in alike(experts):
        starts = [offsets[e] for e in members]
        down = torch.stack([experts.down[a : a + len(grams[members[0]])] for a in starts])
        unit = energies[members]
        inverses = inverse_of(torch.stack([grams[e] for e in members]), ridge * unit) * unit[:, None, None]
        found = costs_in_float32(inverses, down, block) if ridge >= LEAST_IN_FLOAT32 else None
        if found is None:
            found = removal_costs(inverses, down.to(inverses.dtype), block)
        for start, costs in zip(starts, found * unit[:, None], strict=True):
            saliency[start : start + len(costs)] = costs
    return saliency


def costs_in_float32(inverses: Tensor, down: Tensor, block: float) -> Tensor | None:
    """`removal_costs` in half the time, and far less on most GPUs; None where the inverses ask for more precision."""
    try:
        return removal_costs(inverses.float(), down.float(), block).to(inverses.dtype)
    except torch.linalg.LinAlgError:
        return None


def alike(experts: PackedExperts) -> Iterator[list[int]]:
    """Experts of one width that go through the elimination together; those without neurons are left out."""
    experts_of_width: dict[int, list[int]] = {}
    for expert, width in enumerate(experts.widths.tolist()):
        experts_of_width.setdefault(width, []).append(expert)
    experts_of_width.pop(0, None)
    for width, members in experts_of_width.items():
        size = max(1, MOST_NUMBERS // (width * (width + experts.down.shape[1])))
        yield from (members[start : start + size] for start in range(0, len(members), size))


def inverse_of(grams: Tensor, damping: Tensor) -> Tensor:
    """(gram + damping I)^-1, (m, I, I), with ten times the damping as often as a Gram takes; damping (m,) > 0."""
    while True:
        damped = grams.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        factors, is_singular = torch.linalg.cholesky_ex(damped)
        if not is_singular.any():
            return torch.cholesky_inverse(factors)
        damping = torch.where(is_singular > 0, 10 * damping, damping)


def removal_costs(inverses: Tensor, down: Tensor, block: float) -> Tensor:
    """Cost of each neuron's removal after those that are cheaper, (m, I); see `saliency_by_gated_obs`.

    Args:
        inverses: H^-1 of m experts, (m, I, I) positive definite.
        down: (m, I, D).
        block: In (0, 1].
    """
    order = elimination_order(inverses, down, block)
    # Removing a set R costs |L^-1 down_R|^2 with L L^T = [H^-1]_RR; one factorization gives every nested set.
    factors = torch.linalg.cholesky(take(take(inverses, order).mT, order))
    costs = torch.linalg.solve_triangular(factors, take(down, order), upper=False).square().sum(2)
    rising = torch.stack([increasing(of_expert) for of_expert in costs])
    return torch.empty_like(costs).scatter_(1, order, rising)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Some rows of each of m matrices: (m, n, D) and (m, r) int64 -> (m, r, D)."""
    num_matrices, num_rows = rows.shape[:2]
    places = index + num_rows * torch.arange(num_matrices, device=index.device)[:, None]
    return rows.reshape(num_matrices * num_rows, -1).index_select(0, places.flatten()).view(*index.shape, -1)


def increasing(costs: Tensor) -> Tensor:
    """Largest cost so far, (I,); where that stays the same it grows by a unit in the last place each time.

    So what goes later is more salient: equal costs would be told apart by the place of the neuron in its expert.
    """
    largest, place = costs.cummax(0)[0], torch.arange(len(costs), device=costs.device)
    is_new = largest.diff(prepend=largest.new_full((1,), -1.0)) > 0
    start_of_run = torch.where(is_new, place, 0).cummax(0)[0]
    steps = (place - start_of_run).to(largest.dtype)
    return largest * (1 + steps * torch.finfo(largest.dtype).eps)


def elimination_order(inverses: Tensor, down: Tensor, block: float) -> Tensor:
    """Neurons of each expert in the order in which they go, cheapest first, (m, I) int64."""
    left = torch.arange(down.shape[1], device=down.device).expand(len(down), -1)
    order = []
    while left.shape[1] > 1:
        costs = torch.linalg.vector_norm(down, dim=2).square() / inverses.diagonal(dim1=1, dim2=2)
        number = min(left.shape[1] - 1, max(1, int(left.shape[1] * block)))
        chosen = costs.argsort(stable=True)
        gone, stays = chosen[:, :number], chosen[:, number:].sort().values
        order.append(left.gather(1, gone))
        of_gone = take(inverses, gone)
        columns = stays[:, None]
        coupling = of_gone.gather(2, columns.expand(-1, number, -1))
        factors = torch.linalg.cholesky(of_gone.gather(2, gone[:, None].expand(-1, number, -1)))
        moved = torch.cat([coupling, take(down, gone)], dim=2)
        coupling, change = torch.linalg.solve_triangular(factors, moved, upper=False).split(
            [coupling.shape[2], down.shape[2]], dim=2
        )
        down = take(down, stays).baddbmm_(coupling.mT, change, alpha=-1)
        inverses = take(inverses, stays).gather(2, columns.expand(-1, stays.shape[1], -1))
        inverses.baddbmm_(coupling.mT, coupling, alpha=-1)
        left = left.gather(1, stays)
    return torch.cat([*order, left], dim=1)
