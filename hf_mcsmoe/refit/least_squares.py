"""All down projections of a layer at once, by ridge regression on the layer's own output."""

import itertools

import torch
from torch import Tensor

from ..observation.gated_features import FeatureSums
from ..option_checks import check_flag
from ..refit import REFIT
from ..solvers.cholesky import cholesky_in_place

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the large ones are for fewer tokens than features


@REFIT.register("least_squares", check=check_flag("shared_expert", "Leave it out for True."))
def refit_by_least_squares(
    sums: FeatureSums,
    held_out: FeatureSums | None,
    offsets: list[int],
    down: Tensor,
    *,
    ridges: tuple[float, ...] = RIDGES,
    shared_expert: bool = True,  # noqa: ARG001 (`layer.beside` reads it: which features there are)
) -> Tensor:
    """The `down` that minimises sum |y - phi down|^2 + sum_e ridge_e |down_e - down0_e|^2.

    phi are the features of all experts of the layer under the gates that the compressed layer will apply, y the
    output of the original layer: the experts make up for each other, for neurons that are gone, and for gates that
    changed. `ridge_e` is `ridge` times the mean energy of the expert's features, so it pulls rarely used experts to
    the weights they had. From the largest ridge downwards the next one is taken while it lowers the held-out error
    and the sums are precise enough for it; without held-out tokens the largest.

    Args:
        sums: Of the calibration tokens.
        held_out: Of other tokens; None if there are none.
        offsets: Where experts start among the P neurons, M + 1 numbers; the shared expert counts as one, and so do
            all constants of dropped slots together, see `BesideExperts`.
        down: down0, (P, D) float64.
        ridges: Candidates.
        shared_expert: Fit the last matrix of the shared expert too, where the layer has one. All tokens go to it, so
            it is where what all dropped experts gave on average costs nothing.

    Returns:
        (P, D) float64; down0 where no token gave a feature, or no ridge would do. Time O(P^3) for each
        ridge, memory 16 P^2 bytes.

    Raises:
        ValueError: `ridges` has no positive number.
    """
    if not ridges or min(ridges) <= 0:
        raise ValueError(f"ridges is {ridges!r}, it must hold positive numbers. Leave it out for {RIDGES}.")
    energy = mean_energies(sums.gram, offsets)
    residual = torch.addmm(sums.cross, sums.gram, down, alpha=-1)
    best, least = down, float("inf")
    factor = torch.empty_like(sums.gram)
    for ridge in sorted(ridges, reverse=True):
        factor.copy_(sums.gram).diagonal().add_(energy, alpha=ridge)
        if not cholesky_in_place(factor):
            break
        fitted = torch.cholesky_solve(residual, factor).add_(down)
        if held_out is None:
            return fitted
        error = held_out.error(fitted)
        if not error < least:
            break
        best, least = fitted, error
    return best


def mean_energies(gram: Tensor, offsets: list[int]) -> Tensor:
    """For each neuron the mean diagonal entry of its expert, (P,); of all experts where its own saw no token."""
    diagonal = gram.diagonal()
    energy = torch.empty_like(diagonal)
    for start, end in itertools.pairwise(offsets):
        energy[start:end] = diagonal[start:end].mean()
    return torch.where(energy > 0, energy, diagonal.mean())
