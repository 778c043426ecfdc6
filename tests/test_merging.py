"""Merging operators against sums written out number by number."""

import pytest
import torch

from hf_mcsmoe.merging import MERGING
from hf_mcsmoe.merging.average import merge_by_average
from hf_mcsmoe.merging.weighted_average import merge_by_weighted_average

# Operators that need nothing but the matrices; the others have tests of their own.
OPERATORS = [n for n in MERGING if MERGING.trait(n, "takes", "matrices") == "matrices" and not MERGING.asks_for(n)]


def members(num, seed=0, shape=(4, 3)):
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed))


def slow_weighted_mean(matrices, importance):
    rows, columns = matrices.shape[1:]
    merged = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            total = weighted = 0.0
            for matrix, weight in zip(matrices.tolist(), importance.tolist(), strict=True):
                weighted += weight * matrix[row][column]
                total += weight
            merged[row, column] = weighted / total
    return merged.float()


@pytest.mark.parametrize("importance", [[1.0], [0.25, 0.75], [5.0, 1.0, 2.0], [3.0, 0.0, 1.0, 8.0]])
def test_the_weighted_average_is_the_sum_over_members_of_share_times_weight(importance):
    matrices, weights = members(len(importance)), torch.tensor(importance, dtype=torch.float64)
    torch.testing.assert_close(merge_by_weighted_average(matrices, weights), slow_weighted_mean(matrices, weights))


def test_the_average_counts_all_members_alike():
    matrices = members(3)
    expected = slow_weighted_mean(matrices, torch.ones(3))
    torch.testing.assert_close(merge_by_average(matrices, torch.tensor([9.0, 0.0, 1.0])), expected)


def test_only_the_ratio_of_importances_matters():
    matrices, importance = members(3), torch.tensor([2.0, 0.0, 6.0], dtype=torch.float64)
    expected = merge_by_weighted_average(matrices, importance)
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(merge_by_weighted_average(matrices, importance * scale), expected)


def test_a_group_that_was_never_used_keeps_its_dominant_expert():
    matrices = members(3)
    merged = merge_by_weighted_average(matrices, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(merged, matrices[0])


def test_a_member_that_was_never_used_has_no_say():
    matrices = members(3)
    merged = merge_by_weighted_average(matrices, torch.tensor([0.7, 0.0, 0.0], dtype=torch.float64))
    assert torch.equal(merged, matrices[0])
    matrices[1] = 1e30
    pair = merge_by_weighted_average(matrices, torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(pair, (matrices[0] + matrices[2]) / 2)


@pytest.mark.parametrize("shape", [(4, 3), (5, 1)], ids=["matrix", "bias"])
@pytest.mark.parametrize("name", OPERATORS)
def test_merging_identical_members_returns_that_member(name, shape):
    expert = members(1, shape=shape)[0]
    for importance in ([5.0, 1.0, 0.0, 2.0, 7.0], [1.0], [0.0, 0.0]):
        copies = expert.expand(len(importance), *shape)
        torch.testing.assert_close(MERGING[name](copies, torch.tensor(importance)), expert)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_gives_one_float32_matrix_and_leaves_the_members_alone(name):
    matrices, importance = members(4), torch.tensor([0.1, 0.5, 0.0, 0.4], dtype=torch.float64)
    before = matrices.clone()
    merged = MERGING[name](matrices, importance)
    assert merged.shape == (4, 3) and merged.dtype == torch.float32
    assert torch.isfinite(merged).all()
    assert torch.equal(matrices, before)


@pytest.mark.parametrize("name", OPERATORS)
def test_members_other_than_the_dominant_one_may_come_in_any_order(name):
    matrices, importance = members(4), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    order = torch.tensor([0, 3, 1, 2])
    expected = MERGING[name](matrices, importance)
    torch.testing.assert_close(MERGING[name](matrices[order], importance[order]), expected)
