"""The subset of experts whose loss changes the layer's output least, by a genetic search, or by trying all."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from ..grouping import GROUPING
from ..types import ExpertGroups, LayerStatistics

LEAST_POPULATION = 2


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for numbers that no search can have."""
    least = {"population": LEAST_POPULATION, "iterations": 0, "exact_subsets": 0}
    for name, bound in least.items():
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"{name} is {value!r}, it must be a whole number >= {bound}. Leave it out to default.")
    mutation = options["mutation"]
    if isinstance(mutation, bool) or not isinstance(mutation, int | float) or not 0 <= mutation <= 1:
        raise ValueError(f"mutation is {mutation!r}, it must be in [0, 1]: the share of children that are changed.")


@GROUPING.register("genetic_subset", needs=("chosen_gram",), drops=True, check=check_options)
def keep_the_best_subset(
    saliency: Tensor,
    similarity: Tensor | None,
    num_groups: int,
    num_partitions: int = 1,
    *,
    statistics: LayerStatistics,
    seed: int,
    population: int = 100,
    iterations: int = 50,
    mutation: float = 0.2,
    exact_subsets: int = 20_000,
) -> ExpertGroups:
    """Drop the N - M experts whose loss changes the layer's output least: sum over S x S of `chosen_gram`.

    The subset search of MoE-I2 (Yang et al., 2024, https://arxiv.org/abs/2411.01016), known second-hand: a
    population of subsets, children that draw from the union of their parents, mutations that swap one expert, the best
    go on. The output of any subset follows from one (N, N) matrix, so no forward is needed for a candidate; weights of
    a token's other experts stay as they are (the mapped layout). Deviations: the most salient experts are in the first
    population, so that the result is never worse than dropping the least salient ones; small problems are solved
    exactly; the choice among the three best subsets of three layers at a time by the output of all three is left out,
    because each layer is compressed before the next one is looked at.

    Args:
        saliency: (N,): a first guess; ties keep the lower expert.
        similarity: Not used.
        num_groups: M, in 1..N.
        num_partitions: Runs of experts that each keep M / P.
        statistics: Of the layer.
        seed: Of the search.
        population: Subsets that live at a time.
        iterations: Generations.
        mutation: Share of the children in which one dropped expert is swapped for one that was kept.
        exact_subsets: Try all subsets where there are at most so many; 0 never does.

    Raises:
        ValueError: `num_groups` is not a multiple of `num_partitions`.
    """
    num_experts = saliency.numel()
    if num_groups % num_partitions:
        raise ValueError(f"num_groups is {num_groups}, it must be a multiple of {num_partitions}.")
    size, kept = num_experts // num_partitions, num_groups // num_partitions
    gram = statistics["chosen_gram"].cpu()
    if math.comb(size, kept) ** num_partitions <= exact_subsets:
        subsets = all_subsets(size, kept, num_partitions)
    else:
        # Ranks of saliencies, in [0, 1): which ones, not how far apart.
        rank = saliency.argsort(descending=True, stable=True).argsort().cpu() / num_experts
        first = keep_smallest(rank.view(1, num_partitions, size), kept)
        generator = torch.Generator().manual_seed(seed)
        subsets = evolve(gram, first, kept, generator, population, iterations, mutation)
    best = subsets[int(errors_of(gram, subsets).argmin())]
    dominant_of_group = best.flatten().nonzero().flatten()
    group_of_expert = torch.full((num_experts,), -1)
    group_of_expert[dominant_of_group] = torch.arange(num_groups)
    return ExpertGroups(group_of_expert, dominant_of_group)


def all_subsets(size: int, kept: int, num_partitions: int) -> Tensor:
    """Every way to keep `kept` of each run of `size` experts, (C, P, size) bool; lower experts first."""
    rows = torch.tensor(list(itertools.combinations(range(size), kept)))
    of_run = torch.zeros(len(rows), size, dtype=torch.bool).scatter_(1, rows, True)
    choices = torch.tensor(list(itertools.product(range(len(rows)), repeat=num_partitions)))
    return of_run[choices]


def errors_of(gram: Tensor, kept: Tensor) -> Tensor:
    """Squared error of a layer without the experts that are not `kept` (C, P, n) bool, (C,) float64."""
    dropped = (~kept).flatten(1).to(gram.dtype)
    return ((dropped @ gram) * dropped).sum(1)


def keep_smallest(keys: Tensor, kept: int) -> Tensor:
    """The subsets (C, P, n) bool with the smallest `keys` (C, P, n) in each run; ties to the lower expert."""
    chosen = keys.argsort(dim=2, stable=True)[:, :, :kept]
    return torch.zeros(keys.shape, dtype=torch.bool).scatter_(2, chosen, True)


def evolve(
    gram: Tensor, first: Tensor, kept: int, generator: Generator, population: int, iterations: int, mutation: float
) -> Tensor:
    """The last generation, (population, P, n) bool, the best first.

    Args:
        gram: (N, N).
        first: Subsets that are in the first generation, (C, P, n) bool.
        kept: Experts that stay of each run.
        generator: Of all random numbers.
        population: Subsets of a generation.
        iterations: Generations after the first.
        mutation: Share of the children that are changed.
    """
    shape = (population, *first.shape[1:])
    living = torch.cat([first, keep_smallest(torch.rand(shape, generator=generator), kept)])
    for _ in range(iterations + 1):
        living = living[errors_of(gram, living).argsort(stable=True)[:population]]
        parents = living[torch.randint(len(living), (2, population), generator=generator)]
        # Children drop experts that one of the parents drops: there are always enough.
        is_spared = parents.all(0)
        children = keep_smallest(torch.rand(shape, generator=generator) - is_spared.float(), kept)
        children = swap_one(children, torch.rand(population, generator=generator) < mutation, generator)
        before, living = living, torch.cat([living, children])
    return before


def swap_one(subsets: Tensor, is_changed: Tensor, generator: Generator) -> Tensor:
    """In the subsets (C, P, n) that are changed (C,), one expert of a run that stays for one that does not."""
    count, runs, size = subsets.shape
    if subsets.all() or not subsets.any():
        return subsets
    run = torch.randint(runs, (count,), generator=generator)
    of_run = subsets[torch.arange(count), run]  # (C, n)
    keys = torch.rand(count, size, generator=generator)
    leaves, enters = (keys - (~of_run).float()).argmax(1), (keys - of_run.float()).argmax(1)
    changed = of_run.scatter(1, leaves[:, None], False).scatter(1, enters[:, None], True)
    result = subsets.clone()
    result[torch.arange(count), run] = torch.where(is_changed[:, None], changed, of_run)
    return result
