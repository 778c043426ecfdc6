"""Layers keep neurons where the next one that goes would cost most, as measured on calibration tokens."""

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from ..allocation import ALLOCATION
from ..option_checks import check_real
from ..types import LayerStatistics

CHECK_SHARE = check_real("min_share", 0, 1, "1 gives each layer the same share; 0.5 lets it lose half of that.")


@ALLOCATION.register("removal_curve", needs=("stream_energy",), allots="neurons", check=CHECK_SHARE)
def allocate_by_removal_curve(
    costs_of_layer: list[Tensor],
    share_of_layer: list[int],
    *,
    statistics_of_layer: list[LayerStatistics],
    min_share: float = 0.5,
) -> list[int]:
    """Minimise the sum over layers of the squared error of a layer's output over the energy of the residual stream.

    The stream is that after the layer, to which its routed experts have added their output: what the layers behind it
    read, normalised, so its length is the yardstick of a change. Relative to a layer's own output a small error counts
    as much where that output is small beside the stream, and does worse than the same share for all. A few tokens
    with a very long stream, such as attention sinks make, count in full. Ours.

    On a Qwen3-MoE of 16 M parameters (joint_obs and a refit; 168 rows) the mean KL to the original is 0.0663, 0.0114
    and 0.0019 with 25, 50 and 75 % of the neurons, against 0.0662, 0.0122 and 0.0020 with equal shares, and the loss
    grows by 0.101, 0.024 and 0.005 against 0.100, 0.020 and 0.004: its layers deserve nearly the same.

    Args:
        costs_of_layer: What removals of neurons add to the mean squared error of a token, one after another, (P,) a
            layer; infinite for those that it may not lose.
        share_of_layer: Neurons that each layer would keep if all kept the same share; only their sum counts.
        statistics_of_layer: With `stream_energy`.
        min_share: Part of its share that a layer keeps at least; their costs are infinite already.

    Returns:
        Neurons per layer; they add up to `sum(share_of_layer)`.
    """
    weights = []
    for statistics in statistics_of_layer:
        energy = statistics["stream_energy"].item() / statistics.num_tokens
        weights.append(1 / energy if energy > 0 else 0.0)
    return spend(costs_of_layer, weights, share_of_layer)


@ALLOCATION.register("fisher_curve", needs=("output_gradient_energy",), allots="neurons", check=CHECK_SHARE)
def allocate_by_fisher_curve(
    costs_of_layer: list[Tensor],
    share_of_layer: list[int],
    *,
    statistics_of_layer: list[LayerStatistics],
    min_share: float = 0.5,
) -> list[int]:
    """Minimise the sum over layers of the squared error of a layer's output times what the loss asks of that output.

    To second order an error d_t of a layer's output costs (gamma_t . d_t)^2 / 2 where gamma_t is the gradient of the
    loss by that output (the empirical Fisher information). Where errors do not know of the gradients, and gradients
    are alike in all directions, that is in proportion to sum |gamma|^2 times the mean |d|^2. Needs a backward pass.
    HEAPr (Li et al., 2026, https://arxiv.org/abs/2509.22299) weighs single neurons so; this for layers is ours.

    Measured as for `removal_curve`: a KL of 0.0653, 0.0110 and 0.0018, and a loss that grows by 0.098, 0.023 and
    0.004. So it stays closest to the original in all three, and its loss is not less than with equal shares. With
    targets "original_stream" it was 0.094, 0.022 and 0.005 against 0.094, 0.024 and 0.005.

    Args:
        costs_of_layer: As for `removal_curve`.
        share_of_layer: As for `removal_curve`.
        statistics_of_layer: With `output_gradient_energy`.
        min_share: As for `removal_curve`.

    Returns:
        Neurons per layer; they add up to `sum(share_of_layer)`.
    """
    weights = [statistics["output_gradient_energy"].item() for statistics in statistics_of_layer]
    return spend(costs_of_layer, weights, share_of_layer)


def spend(costs_of_layer: list[Tensor], weights: list[float], share_of_layer: list[int]) -> list[int]:
    """Neurons per layer that make the sum of the weighted costs of all removals least.

    The neurons of a layer go in a fixed order, so it is a matter of how many. Where costs rise these are the cheapest
    removals of all layers. Where they do not they are levelled first (isotonic regression): the result is then best
    for every total at which a level ends, and between two of these off by less than one level. (An exact programme
    over all totals takes the square of the number of neurons.) Ties: the layer that lost fewer loses first, then the
    earlier one.

    Args:
        costs_of_layer: In the order of removal, (P,) a layer, >= 0; infinite for neurons that stay, the last ones.
        weights: >= 0.
        share_of_layer: What each layer may keep at least, or more; only the sum counts.

    Returns:
        They add up to the sum of the shares.
    """
    levels, places, layers = [], [], []
    for layer, (costs, weight) in enumerate(zip(costs_of_layer, weights, strict=True)):
        free = costs[costs.isfinite()]
        levels.append(rising(free.double().cpu()) * weight)
        places.append(torch.arange(len(free)))
        layers.append(torch.full((len(free),), layer))
    num_gone = sum(len(costs) for costs in costs_of_layer) - sum(share_of_layer)
    by_place = torch.cat(places).argsort(stable=True)
    by_cost = torch.cat(levels)[by_place].argsort(stable=True)
    gone = torch.cat(layers)[by_place[by_cost[:num_gone]]].bincount(minlength=len(costs_of_layer))
    return [len(costs) - number for costs, number in zip(costs_of_layer, gone.tolist(), strict=True)]


def rising(costs: Tensor) -> Tensor:
    """Costs (n,) with neighbours that fall replaced by their mean, as often as it takes: convex sums, float64."""
    return torch.from_numpy(isotonic_regression(costs.numpy()).x) if len(costs) else costs
