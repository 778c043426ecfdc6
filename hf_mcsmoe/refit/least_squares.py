"""All down projections of a layer at once, by ridge regression on the layer's own output."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..observation.gated_features import FeatureSums
from ..option_checks import check_flag
from ..refit import REFIT
from ..solvers.cholesky import cholesky_in_place

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # the large ones are for fewer tokens than features
JUDGED_COLUMNS = 64  # of all outputs: what tells ridges apart, at a share of the time of a whole solution


@REFIT.register("least_squares", check=check_flag("shared_expert", "Leave it out for True."))
def refit_by_least_squares(
    sums: FeatureSums,
    held_out_error: Callable[[Tensor, slice], float] | None,
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
    the weights they had. The one in the middle is tried first, then smaller ones while that lowers the held-out
    error and the sums are precise enough for them, then, where none was better, larger ones; without held-out tokens
    the largest is taken. The error is that of `JUDGED_COLUMNS` of the D numbers of an output, or a few more.

    Args:
        sums: Of the calibration tokens.
        held_out_error: Of columns of a `down` (P, C) and which they are, on other tokens; None if there are none.
        offsets: Where experts start among the P neurons, M + 1 numbers; the shared expert counts as one, and so do
            all constants of dropped slots together, see `BesideExperts`.
        down: down0, (P, D) float64.
        ridges: Candidates.
        shared_expert: Fit the last matrix of the shared expert too, where the layer has one. All tokens go to it, so
            it is where what all dropped experts gave on average costs nothing.

    Returns:
        (P, D) float64; down0 where no token gave a feature, or no ridge would do. Time O(P^3) for each
        ridge that is tried, memory 24 P^2 bytes.

    Raises:
        ValueError: `ridges` has no positive number.
    """
    if not ridges or min(ridges) <= 0:
        raise ValueError(f"ridges is {ridges!r}, it must hold positive numbers. Leave it out for {RIDGES}.")
    energy = mean_energies(sums.gram, offsets)
    residual = torch.addmm(sums.cross, sums.gram, down, alpha=-1)
    factor, best = torch.empty_like(sums.gram), None

    def factorize(ridge: float) -> bool:
        factor.copy_(sums.gram).diagonal().add_(energy, alpha=ridge)
        return cholesky_in_place(factor)

    falling = sorted(ridges, reverse=True)
    if held_out_error is None:
        return torch.cholesky_solve(residual, factor).add_(down) if factorize(falling[0]) else down
    some = slice(None, None, max(1, down.shape[1] // JUDGED_COLUMNS))
    least, chosen, middle = float("inf"), None, len(falling) // 2
    for way in (falling[middle:], falling[:middle][::-1]):
        if chosen not in (None, falling[middle]):
            break  # a smaller one was better than the first, so larger ones are not
        for ridge in way:
            error = float("inf")
            if factorize(ridge):
                error = held_out_error(torch.cholesky_solve(residual[:, some], factor).add_(down[:, some]), some)
            if error < least:
                least, chosen = error, ridge
                factor, best = torch.empty_like(factor) if best is None else best, factor
            elif chosen is not None:
                break
    return down if best is None else torch.cholesky_solve(residual, best).add_(down)


def mean_energies(gram: Tensor, offsets: list[int]) -> Tensor:
    """For each neuron the mean diagonal entry of its expert, (P,); of all experts where its own saw no token."""
    diagonal = gram.diagonal()
    energy = torch.empty_like(diagonal)
    for start, end in itertools.pairwise(offsets):
        energy[start:end] = diagonal[start:end].mean()
    return torch.where(energy > 0, energy, diagonal.mean())
