"""Usage frequencies, and budgets that are exact whatever the ties."""

import itertools

import pytest
import torch

from hf_mcsmoe.allocation import ALLOCATION
from hf_mcsmoe.allocation.global_usage import allocate_by_global_usage
from hf_mcsmoe.allocation.uniform import allocate_uniformly
from hf_mcsmoe.saliency import SALIENCY
from hf_mcsmoe.saliency.usage_frequency import usage_frequency
from hf_mcsmoe.statistics import STATISTICS
from hf_mcsmoe.types import ExpertWeights, LayerStatistics

WEIGHTS = ExpertWeights(up=torch.zeros(4, 2, 3), down=torch.zeros(4, 3, 2))


def hand_out_one_by_one(saliency_of_layer, total, least=1, most=None):
    """methods.md A.3, robust rule, slowly: reserve, then one slot at a time to the largest score left.

    Scores tie to the lower (layer, expert). A layer that has `most` experts gets no more.
    """
    left = {
        (layer, expert): score
        for layer, saliency in enumerate(saliency_of_layer)
        for expert, score in enumerate(saliency.tolist())
    }
    allotted = [0] * len(saliency_of_layer)

    def take_best(layers):
        best = None
        for place, score in sorted(left.items()):
            if place[0] in layers and (best is None or score > left[best]):
                best = place
        del left[best]
        allotted[best[0]] += 1

    for layer in range(len(allotted)):
        for _ in range(least):
            take_best({layer})
    while sum(allotted) < total:
        take_best({layer for layer, count in enumerate(allotted) if most is None or count < most})
    return allotted


def frequencies(rows):
    return [torch.tensor(row, dtype=torch.float64) / (sum(row) or 1) for row in rows]


def test_usage_frequency_counts_selections():
    statistics = LayerStatistics(num_tokens=5, selection_count=torch.tensor([2, 0, 7, 1]))
    score = usage_frequency(statistics, WEIGHTS)
    assert score.tolist() == [0.2, 0.0, 0.7, 0.1]
    assert score.dtype == torch.float64


@pytest.mark.parametrize("name", list(SALIENCY))
def test_every_saliency_is_finite_where_no_expert_was_used(name):
    shapes = {"chosen_gram": (4, 4)}
    sums = {
        one: torch.zeros(shapes.get(one, (4,)), dtype=torch.float64) for one in SALIENCY.needs(name) & set(STATISTICS)
    }
    score = SALIENCY[name](LayerStatistics(5, torch.zeros(4, dtype=torch.int64), sums), WEIGHTS)
    assert score.shape == (4,) and score.dtype == torch.float64
    assert torch.isfinite(score).all()


def test_uniform_gives_each_layer_its_own_share():
    assert allocate_uniformly(frequencies([[9, 0, 0], [1, 1, 1]]), [2, 1]) == [2, 1]


def test_the_most_used_experts_of_all_layers_stay():
    # Reserved: .5 of layer 0 and .4 of layer 1. Then .3, .3 (layer 0 before 1), .2 of layer 0: 3 + 2.
    rows = [[20, 50, 30, 0], [40, 15, 30, 15]]
    assert allocate_by_global_usage(frequencies(rows), [2, 3]) == [3, 2]


def test_a_reserved_expert_does_not_count_twice():
    # Layer 1 is balanced: its best is reserved although .25 loses against .4 and .3 of layer 0.
    rows = [[40, 30, 30, 0], [25, 25, 25, 25]]
    assert allocate_by_global_usage(frequencies(rows), [2, 2]) == [3, 1]


ADVERSARIAL = {
    "all layers balanced": [[1] * 4] * 3,
    "no token anywhere": [[0] * 5] * 3,
    "one expert takes all": [[0, 0, 9, 0], [0, 9, 0, 0], [9, 0, 0, 0]],
    "unused but one layer": [[0] * 4, [3, 1, 2, 2], [0] * 4],
    "ties at the threshold": [[2, 1, 1, 1, 1, 2], [1, 2, 1, 2, 1, 1], [1, 1, 2, 1, 2, 1]],
    "layers of different size": [[4, 1], [1, 1, 1, 1, 1, 1, 1, 1], [5, 5, 5]],
    "one layer": [[3, 3, 1, 3]],
    "one expert each": [[7], [7]],
}


@pytest.mark.parametrize("rows", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_every_budget_of_adversarial_layers_is_met_as_by_hand(rows):
    saliency = frequencies(rows)
    for total in range(len(rows), sum(map(len, rows)) + 1):
        budget = [total - len(rows) + 1] + [1] * (len(rows) - 1)  # only the sum counts
        allotted = allocate_by_global_usage(saliency, budget)
        assert allotted == hand_out_one_by_one(saliency, total)
        assert sum(allotted) == total


@pytest.mark.parametrize("seed", range(40))
def test_random_budgets_with_ties_and_limits_are_met_as_by_hand(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return torch.randint(low, high + 1, (1,), generator=generator).item()

    rows = [torch.randint(0, 4, (draw(3, 6),), generator=generator).tolist() for _ in range(draw(1, 5))]
    least, most = draw(1, 2), draw(2, 6)
    ceiling = sum(min(len(row), most) for row in rows)
    total = draw(len(rows) * least, ceiling)
    budget = [total // len(rows)] * (len(rows) - 1)
    allotted = allocate_by_global_usage(
        frequencies(rows), [*budget, total - sum(budget)], min_experts=least, max_experts=most
    )
    assert allotted == hand_out_one_by_one(frequencies(rows), total, least, most)
    assert sum(allotted) == total
    assert all(least <= count <= min(most, len(row)) for count, row in zip(allotted, rows, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_no_other_allocation_keeps_more_usage(seed):
    generator = torch.Generator().manual_seed(seed)
    saliency = [torch.rand(size, generator=generator).double() for size in (3, 4, 2)]
    saliency = [scores / scores.sum() for scores in saliency]

    def kept(counts):
        return sum(s.topk(count).values.sum().item() for s, count in zip(saliency, counts, strict=True))

    allotted = allocate_by_global_usage(saliency, [2, 2, 1])
    possible = [c for c in itertools.product(range(1, 4), range(1, 5), range(1, 3)) if sum(c) == 5]
    assert kept(allotted) == pytest.approx(max(map(kept, possible)))


def test_keeping_all_experts_is_a_budget_too():
    assert allocate_by_global_usage(frequencies([[1, 0, 0], [2, 2, 2]]), [3, 3]) == [3, 3]


@pytest.mark.parametrize(
    "budget, options, why",
    [
        ([1, 0], {}, "A budget of 1 experts over 2 layers cannot keep at least min_experts=1"),
        ([4, 4], {}, r"A budget of 8 experts over 2 layers.*of \[4, 3\] experts"),
        ([2, 2], {"min_experts": 3}, "cannot keep at least min_experts=3"),
        ([3, 3], {"max_experts": 2}, "at most max_experts=2.*Change keep, min_experts or max_experts"),
        ([3, 3], {"max_experts": 0}, "at most max_experts=0"),
        ([3, 3], {"min_experts": 4}, "cannot keep at least min_experts=4"),  # layer 1 has 3
        ([4, 3], {"min_experts": 3, "max_experts": 2}, "min_experts=3 and at most max_experts=2"),
        ([2, 2], {"min_experts": 0}, "min_experts=0"),
    ],
)
def test_a_budget_that_cannot_be_spent_exactly_is_refused(budget, options, why):
    with pytest.raises(ValueError, match=why):
        allocate_by_global_usage(frequencies([[4, 3, 2, 1], [1, 2, 3]]), budget, **options)


@pytest.mark.parametrize("name", [name for name in ALLOCATION if not ALLOCATION.asks_for(name)])
def test_every_allocation_spends_the_budget_exactly(name):
    saliency = frequencies([[5, 5, 0, 0], [1, 2, 3, 4], [1, 1, 1, 1]])
    sums = {"chosen_gram": torch.eye(4)}
    of_layer = [LayerStatistics(1, torch.ones(4, dtype=torch.int64), sums)] * 3
    supply = {"statistics_of_layer": lambda: of_layer}
    allotted = ALLOCATION.call(name, saliency, [2, 2, 2], options={}, supply=supply)
    assert sum(allotted) == 6
    assert all(1 <= count <= 4 for count in allotted)
