"""One budget of neurons for all layers: the rules against brute force, and what they read against refits."""

import itertools
import re

import pytest
import torch
from fit_layers import FORMATS, activation, packed_experts, routed, with_targets_of
from test_joint_obs import slow_minimum

from hf_mcsmoe import Recipe
from hf_mcsmoe.allocation import ALLOCATION
from hf_mcsmoe.allocation.removal_curve import rising, spend
from hf_mcsmoe.layer.fit import grams_of
from hf_mcsmoe.observation.gated_features import sum_features
from hf_mcsmoe.observation.kept_features import KeptFeatures
from hf_mcsmoe.observation.observed import ObservedTokens
from hf_mcsmoe.selection.joint_obs import joint_removals
from hf_mcsmoe.statistics import STATISTICS
from hf_mcsmoe.types import LayerStatistics

SELECT = {"selection": "joint_obs", "refit": "least_squares"}
WIDTHS = (4, 0, 3, 5)
RIDGE = 1e-2
INF = torch.inf


def curve(*costs, stay=1):
    """Costs of a layer whose `stay` last neurons may not go."""
    return torch.tensor([*costs, *[INF] * stay], dtype=torch.float64)


def total_cost(costs_of_layer, weights, kept):
    """What all removals cost together."""
    parts = zip(costs_of_layer, weights, kept, strict=True)
    return sum(weight * costs[: len(costs) - number].sum().item() for costs, weight, number in parts)


def least_cost(costs_of_layer, weights, total):
    """The least of all splits of `total` neurons, by trying every one."""
    ranges = [range(int(costs.isinf().sum()), len(costs) + 1) for costs in costs_of_layer]
    splits = [split for split in itertools.product(*ranges) if sum(split) == total]
    return min(total_cost(costs_of_layer, weights, split) for split in splits)


def random_curves(seed, *, rising):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(size, generator=generator, dtype=torch.float64) for size in (6, 4, 9)]
    drawn = [costs.sort().values if rising else costs for costs in drawn]
    return [curve(*costs.tolist(), stay=1 + place) for place, costs in enumerate(drawn)]


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_levelled_as_the_formula_of_isotonic_regression_says(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 5, (12,), generator=generator).double()

    def mean(start, end):
        return values[start:end].mean().item()

    expected = [
        max(min(mean(start, end) for end in range(place + 1, 13)) for start in range(place + 1)) for place in range(12)
    ]
    assert rising(values).tolist() == pytest.approx(expected)
    for given, expected in (([], []), ([3.0], [3.0]), ([2.0, 1.0], [1.5, 1.5])):
        assert rising(torch.tensor(given, dtype=torch.float64)).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_rising_costs_are_spent_as_the_best_of_all_splits(seed):
    costs, weights = random_curves(seed, rising=True), [1.0, 0.3, 2.0]
    num_neurons = sum(map(len, costs))
    for total in range(6, num_neurons + 1):  # 1 + 2 + 3 stay
        kept = spend(costs, weights, [total, 0, 0])
        assert sum(kept) == total
        assert all(number >= costs[place].isinf().sum() for place, number in enumerate(kept))
        assert total_cost(costs, weights, kept) == pytest.approx(least_cost(costs, weights, total))


@pytest.mark.parametrize("seed", range(3))
def test_costs_that_fall_are_spent_best_where_a_level_ends(seed):
    costs, weights = random_curves(seed, rising=False), [1.0, 0.3, 2.0]
    num_neurons, num_ends = sum(map(len, costs)), 0
    for total in range(6, num_neurons + 1):
        kept = spend(costs, weights, [0, total, 0])
        assert sum(kept) == total
        levels = [rising(one[one.isfinite()].double()).tolist() for one in costs]
        gone = [len(one) - number for one, number in zip(costs, kept, strict=True)]
        within = [0 < n < len(level) and level[n - 1] == level[n] for level, n in zip(levels, gone, strict=True)]
        cost, least = total_cost(costs, weights, kept), least_cost(costs, weights, total)
        if not any(within):
            num_ends += 1
            assert cost == pytest.approx(least)
        assert least <= cost + 1e-12
    assert 5 < num_ends < num_neurons - 6


def test_ties_one_layer_and_layers_without_costs():
    assert spend([curve(1, 1, 1), curve(1, 1, 1)], [1.0, 1.0], [3, 2]) == [2, 3]  # the earlier one loses first
    assert spend([curve(1, 1, 1), curve(1, 1, 1)], [1.0, 1.0], [2, 2]) == [2, 2]  # and none twice before all
    assert spend([curve(3, 1, 2, stay=2)], [5.0], [4]) == [4]
    assert spend([curve(0, 0, 0, stay=2), curve(1, 1, 1, 1)], [1.0, 1.0], [3, 4]) == [2, 5]  # nothing to lose there
    assert spend([curve(1, 1, 1, 1), curve(1, 1, 1, 1)], [0.0, 1.0], [4, 3]) == [2, 5]
    assert spend([curve(1, 2), curve(1, 2)], [1.0, 1.0], [3, 3]) == [3, 3]  # all stay


def test_costs_count_relative_to_the_stream_or_times_the_gradients():
    costs = [curve(1, 2, 3), curve(1, 2, 3)]

    def of_layer(**sums):
        sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
        return LayerStatistics(10, torch.ones(2, dtype=torch.int64), sums)

    # Mean energies of 4 and 1: a removal costs 4 times as much in the second layer. In a silent one it costs nothing.
    streams = [of_layer(stream_energy=40.0), of_layer(stream_energy=10.0)]
    assert ALLOCATION["removal_curve"](costs, [3, 2], statistics_of_layer=streams) == [1, 4]
    gradients = [of_layer(output_gradient_energy=4.0), of_layer(output_gradient_energy=1.0)]
    assert ALLOCATION["fisher_curve"](costs, [3, 2], statistics_of_layer=gradients) == [4, 1]
    silent = [of_layer(stream_energy=0.0), of_layer(stream_energy=10.0)]
    assert ALLOCATION["removal_curve"](costs, [3, 2], statistics_of_layer=silent) == [1, 4]


def test_padding_has_no_gradient_that_counts():
    gradients = torch.tensor([[1.0, 2.0], [100.0, 100.0], [0.0, -3.0]])
    routing = {"top_k_index": torch.zeros(3, 1, dtype=torch.int64), "top_k_weights": torch.ones(3, 1)}
    mask = torch.tensor([True, False, True])
    seen = ObservedTokens(2, torch.zeros(3, 2), **routing, token_mask=mask, output_gradients=gradients)
    assert STATISTICS["output_gradient_energy"](seen).item() == 1 + 4 + 9


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("block", [1e-9, 0.4])
def test_the_sum_of_costs_is_what_a_refit_without_these_neurons_loses(form, block):
    """Whatever the block: it changes the order, not what an order costs."""
    experts = packed_experts(FORMATS[form], WIDTHS)
    tokens = with_targets_of(packed_experts(widths=WIDTHS, seed=7), routed(60, len(WIDTHS)), noise=0.5)
    sums = sum_features(experts, activation, [tokens])
    grams = grams_of(KeptFeatures(experts, activation, [tokens]))
    order, costs = joint_removals(experts, grams, sums, (3, 1), RIDGE, block)
    assert sorted(order.tolist()) == list(range(12)) and len(costs) == 9
    everything = slow_minimum(experts, tokens, list(range(12)))
    for number in range(10):
        left = sorted(order[number:].tolist())
        expected = slow_minimum(experts, tokens, left) - everything
        assert costs[:number].sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-6 * everything)


REFUSED = {
    "native": ({"layout": "native", **SELECT}, "layout 'native' needs the same number"),
    "no selection": ({}, "shares neurons among layers, but selection is None. Name a selection"),
    "fewer experts": ({"keep": 0.4, "keep_experts": 0.75, **SELECT}, "with keep_experts all layers keep the same"),
    "a shared base": ({"shared_base": "whitened_deltas"}, "selection is None"),
    "a decomposition": ({"decomposition": "low_rank_sparse"}, "selection is None"),
    "a share above 1": (
        {**SELECT, "allocation_options": {"min_share": 1.5}},
        "min_share is 1.5, it must be in [0, 1]",
    ),
    "no number": ({**SELECT, "allocation_options": {"min_share": None}}, "min_share is None"),
    "unions": ({**SELECT, "merging": "union"}, "merging 'union' makes others of their neurons"),
    "a number of experts": ({**SELECT, "num_experts": 4}, "selection 'joint_obs' keeps neurons"),
}


@pytest.mark.parametrize("rule", ["removal_curve", "fisher_curve"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_rules_cannot_mean_is_refused(case, rule):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(allocation=rule, **changes)


def test_a_recipe_says_what_its_rule_needs():
    recipe = Recipe(allocation="fisher_curve", selection="gated_energy")
    assert recipe.allots_neurons and recipe.needs_inputs
    assert recipe.statistics_with("gradients") == ["output_gradient_energy"]
    assert not Recipe(**SELECT).allots_neurons and Recipe(**SELECT).allocation == "uniform"
