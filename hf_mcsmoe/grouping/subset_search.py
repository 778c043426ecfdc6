"""The subset of experts that changes the output of its layer least, the others are dropped."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..expert_values import PackedExperts
from ..grouping import GROUPING
from ..observation.gated_features import Activation, features_of_experts
from ..types import ExpertGroups, ExpertWeights

if TYPE_CHECKING:
    from ..observation.layer_tokens import LayerTokens

MOST_OUTPUTS = 2**24  # numbers that all experts give at a time


def check(options: dict[str, Any]) -> None:
    """Raise ValueError for an option of `search_subset` that is out of bounds."""
    for name, least in (("max_subsets", 0), ("candidates", 1), ("most_tokens", 1)):
        value = options[name]
        if value is None and name == "candidates":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name} of grouping 'subset_search' is {value!r}, it must be a whole number >= {least}. "
                "Leave it out for the default."
            )


@GROUPING.register("subset_search", drops=True, check=check)
def search_subset(
    saliency: Tensor,
    similarity: Tensor | None,
    num_groups: int,
    num_partitions: int = 1,
    *,
    tokens: "LayerTokens",
    weights: ExpertWeights,
    layout: str,
    protected: Tensor,
    max_subsets: int = 1000,
    candidates: int | None = None,
    most_tokens: int = 8192,
) -> ExpertGroups:
    """Expert pruning by the error of the layer's output, |F(X) - F_K(X)|^2, over subsets K of M experts.

    NAEE ("Not all experts are equal", Lu et al., 2024, https://arxiv.org/abs/2402.14800): F_K is the layer without
    the other experts, its gates as the cut router gives them; in the mapped layout, where gates stay, dropped experts
    add nothing. All subsets are tried where there are at most `max_subsets`, as in the paper. Beyond that, which the
    paper leaves open, experts go one by one, each time the one whose loss costs least (ties: the higher one).

    Memory: 4 T N^2 bytes for the inner products of what the N experts give for each of T tokens; the experts in
    float32. Time: all experts on these tokens, and for each subset one run of the router and T N^2.

    Args:
        saliency: (N,). With `candidates` the least salient of them may go; else not used.
        similarity: Not used.
        num_groups: M, in 1..N.
        num_partitions: Runs of experts that each keep M / P.
        tokens: Of the N experts.
        weights: Of the N experts.
        layout: "mapped" or "native".
        protected: Experts that must stay, (N,) bool.
        max_subsets: Most subsets to try all of.
        candidates: How many experts are tried in each step of the elimination; None for all that are left.
        most_tokens: Calibration batches are left out while more tokens than these would be used, the first never.
    """
    errors = SubsetErrors(tokens, weights, layout, most_tokens)
    sizes = partition_sizes(saliency.numel(), num_partitions)
    least = num_groups // num_partitions
    free = saliency.numel() - int(protected.sum())
    number = math.comb(sizes[0], least) ** num_partitions
    if num_partitions == 1:
        number = math.comb(free, max(0, num_groups - int(protected.sum())))
    if number <= max_subsets:
        subsets = subsets_of(sizes, least, protected)
        kept = min(subsets, key=errors)  # the first of several alike
    else:
        kept = eliminate(errors, saliency, sizes, least, protected, candidates)
    dominant_of_group = torch.tensor(kept)
    group_of_expert = torch.full((saliency.numel(),), -1)
    group_of_expert[dominant_of_group] = torch.arange(num_groups)
    return ExpertGroups(group_of_expert, dominant_of_group)


def partition_sizes(num_experts: int, num_partitions: int) -> list[int]:
    """How many experts each of the runs of experts has."""
    return [num_experts // num_partitions] * num_partitions


def subsets_of(sizes: list[int], least: int, protected: Tensor) -> Iterator[tuple[int, ...]]:
    """All choices of `least` experts of each run that hold the protected ones, ascending."""
    needed = set(protected.nonzero().flatten().tolist())
    starts = itertools.accumulate([0, *sizes[:-1]])
    runs = [
        itertools.combinations(range(start, start + size), least) for start, size in zip(starts, sizes, strict=True)
    ]
    for parts in itertools.product(*runs):
        subset = tuple(itertools.chain.from_iterable(parts))
        if needed <= set(subset):
            yield subset


def eliminate(
    errors: Callable[[tuple[int, ...]], float],
    saliency: Tensor,
    sizes: list[int],
    least: int,
    protected: Tensor,
    candidates: int | None,
) -> tuple[int, ...]:
    """Let experts go one by one until each run has `least`."""
    kept = list(range(saliency.numel()))
    size = sizes[0]
    left = list(sizes)
    rank = saliency.argsort(stable=True).argsort(stable=True).tolist()
    while sum(left) > least * len(sizes):
        may_go = [e for e in kept if left[e // size] > least and not protected[e]]
        if candidates is not None:
            may_go = sorted(sorted(may_go, key=lambda e: (rank[e], -e))[:candidates])
        gone = min(may_go, key=lambda e: (errors(tuple(k for k in kept if k != e)), -e))
        kept.remove(gone)
        left[gone // size] -= 1
    return tuple(kept)


class SubsetErrors:
    """The squared error of a layer's output for a subset of its experts, summed over the kept calibration tokens.

    With g the original gates and g' those of the subset the error of a token is (g' - g)^T G (g' - g), G the inner
    products of what all experts give for it.
    """

    def __init__(self, tokens: "LayerTokens", weights: ExpertWeights, layout: str, most_tokens: int):
        fields = {name: tensor.float() for name, tensor in weights.tensors().items()}
        experts = PackedExperts.from_dense(ExpertWeights(**fields))
        self.tokens = tokens
        self.is_native = layout == "native"
        self.places = spread([len(batch.gates) for batch in tokens.calibration], most_tokens)
        batches = [tokens.calibration[place] for place in self.places]
        self.gates = [batch.gates.to(experts.up.device) for batch in batches]
        self.grams = [
            torch.cat(list(output_grams(experts, tokens.activation, batch.hidden_states.to(experts.up.device))))
            for batch in batches
        ]

    def __call__(self, kept: tuple[int, ...]) -> float:
        """The error of the subset `kept`, ascending."""
        rows = torch.tensor(kept)
        if self.is_native:
            changed = self.tokens.gates_of_kept(rows, self.places)
        else:
            changed = [
                torch.zeros_like(g).index_copy_(1, rows.to(g.device), g[:, rows.to(g.device)]) for g in self.gates
            ]
        total = 0.0
        for now, before, gram in zip(changed, self.gates, self.grams, strict=True):
            change = now.to(before.device) - before
            total += ((change[:, None] @ gram)[:, 0] * change).sum(dtype=torch.float64).item()
        return total


def spread(sizes: list[int], most: int) -> list[int]:
    """Places of batches of these sizes, evenly spread, with at most `most` tokens together, or one batch."""
    for step in range(1, len(sizes) + 1):
        places = list(range(0, len(sizes), step))
        if sum(sizes[place] for place in places) <= most:
            return places
    return [0] if sizes else []


@torch.no_grad()
def output_grams(experts: PackedExperts, activation: Activation, hidden_states: Tensor) -> Iterator[Tensor]:
    """Inner products of what all experts give for each token, (t, N, N) float32 a chunk of tokens."""
    num_experts, offsets = experts.num_experts, experts.offsets.tolist()
    size = max(1, MOST_OUTPUTS // (num_experts * experts.up.shape[1]))
    for chunk in hidden_states.split(size):
        ones = torch.ones(len(chunk), num_experts, device=chunk.device)
        found = features_of_experts(experts, activation, chunk, ones)
        outputs = []
        for expert, (_, features) in enumerate(found):
            output = features @ experts.down[offsets[expert] : offsets[expert + 1]]
            outputs.append(output if experts.down_bias is None else output + experts.down_bias[expert])
        stacked = torch.stack(outputs, dim=1)
        yield stacked @ stacked.transpose(1, 2)
