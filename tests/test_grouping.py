"""Who leads and who joins whom, on inputs where usage rank and expert id differ."""

import pytest
import torch

from hf_mcsmoe.grouping import GROUPING
from hf_mcsmoe.grouping.dominant_experts import choose_dominant, group_around_dominant_experts
from hf_mcsmoe.grouping.drop import drop_the_least_salient

# Groupings that need nothing but saliency and similarity; the others have tests of their own.
GROUPINGS = [name for name in GROUPING if not GROUPING.asks_for(name)]


def slow_dominant(saliency, num_groups, num_partitions=1):
    """The best experts of each run of N / P, ties to the lower id, by sorting plain tuples."""
    size = len(saliency) // num_partitions
    chosen = []
    for start in range(0, len(saliency), size):
        run = sorted(range(start, start + size), key=lambda expert: (-saliency[expert].item(), expert))
        chosen += run[: num_groups // num_partitions]
    return sorted(chosen)


def slow_groups(saliency, similarity, num_groups, num_partitions=1):
    """Each expert asks every leader in turn; only a strictly better one changes its mind."""
    leaders = slow_dominant(saliency, num_groups, num_partitions)
    labels = []
    for expert in range(len(saliency)):
        if expert in leaders:
            labels.append(leaders.index(expert))
            continue
        best = 0
        for group, leader in enumerate(leaders):
            if similarity[expert, leader] > similarity[expert, leaders[best]]:
                best = group
        labels.append(best)
    return leaders, labels


def symmetric(size, generator, levels=None):
    values = torch.rand(size, size, generator=generator, dtype=torch.float64)
    if levels is not None:
        values = (values * levels).round()
    return (values + values.T) / 2


@pytest.mark.parametrize("like_of_expert, labels", [([2, 3], [0, 1, 0, 1]), ([3, 2], [1, 0, 0, 1])])
def test_experts_join_their_most_similar_dominant(like_of_expert, labels):
    # The case of the public code's bug: usage order 3 > 2 > 1 > 0, so rank and expert id differ everywhere, and
    # non-dominant experts whose id is below M = 2 kept their own id as label. Leaders by id are 2 and 3.
    saliency = torch.tensor([0.1, 0.2, 0.3, 0.4])
    similarity = torch.eye(4)
    for expert, leader in enumerate(like_of_expert):
        similarity[expert, leader] = similarity[leader, expert] = 0.9
    groups = group_around_dominant_experts(saliency, similarity, num_groups=2)
    assert groups.dominant_of_group.tolist() == [2, 3]
    assert groups.group_of_expert.tolist() == labels


def test_low_ids_without_usage_do_not_keep_a_group_of_their_own():
    # 6 experts, leaders 1 and 4. Everyone else is most like 4, also experts 0 and 2 whose ids are small.
    saliency = torch.tensor([0.0, 0.5, 0.0, 0.05, 0.4, 0.05])
    similarity = torch.full((6, 6), 0.1)
    similarity[:, 4] = similarity[4] = 0.8
    groups = group_around_dominant_experts(saliency, similarity, num_groups=2)
    assert groups.dominant_of_group.tolist() == [1, 4]
    assert groups.group_of_expert.tolist() == [1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_grouping_equals_the_slow_reference(seed):
    generator = torch.Generator().manual_seed(seed)
    for num_experts in (2, 5, 8):
        saliency = torch.rand(num_experts, generator=generator)
        similarity = symmetric(num_experts, generator)
        for num_groups in range(1, num_experts + 1):
            leaders, labels = slow_groups(saliency, similarity, num_groups)
            groups = group_around_dominant_experts(saliency, similarity, num_groups)
            assert groups.dominant_of_group.tolist() == leaders
            assert groups.group_of_expert.tolist() == labels


@pytest.mark.parametrize("seed", range(20))
def test_ties_go_to_the_lower_expert_and_the_lower_group(seed):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.randint(0, 3, (9,), generator=generator).double()
    similarity = symmetric(9, generator, levels=2)
    for num_groups in (1, 2, 4, 8):
        leaders, labels = slow_groups(saliency, similarity, num_groups)
        groups = group_around_dominant_experts(saliency, similarity, num_groups)
        assert groups.dominant_of_group.tolist() == leaders
        assert groups.group_of_expert.tolist() == labels


def test_equal_experts_are_led_by_the_first_ones():
    groups = group_around_dominant_experts(torch.zeros(40), torch.ones(40, 40), num_groups=3)
    assert groups.dominant_of_group.tolist() == [0, 1, 2]
    assert groups.group_of_expert.tolist() == [0, 1, 2] + [0] * 37


def test_the_diagonal_of_the_similarity_is_not_used():
    generator = torch.Generator().manual_seed(0)
    saliency, similarity = torch.rand(7, generator=generator), symmetric(7, generator)
    changed = similarity.clone().fill_diagonal_(-5)
    left = group_around_dominant_experts(saliency, similarity, 3)
    right = group_around_dominant_experts(saliency, changed, 3)
    assert torch.equal(left.group_of_expert, right.group_of_expert)


@pytest.mark.parametrize("num_partitions", [2, 4])
def test_every_partition_contributes_the_same_number_of_leaders(num_partitions):
    generator = torch.Generator().manual_seed(num_partitions)
    saliency = torch.randint(0, 5, (16,), generator=generator).double()
    similarity = symmetric(16, generator)
    for num_groups in (4, 8, 12, 16):
        leaders, labels = slow_groups(saliency, similarity, num_groups, num_partitions)
        groups = group_around_dominant_experts(saliency, similarity, num_groups, num_partitions)
        assert groups.dominant_of_group.tolist() == leaders
        assert groups.group_of_expert.tolist() == labels
        runs = (groups.dominant_of_group // (16 // num_partitions)).bincount(minlength=num_partitions)
        assert runs.tolist() == [num_groups // num_partitions] * num_partitions


def test_a_member_may_join_a_leader_of_another_partition():
    # Runs {0, 1} and {2, 3}, leaders 0 and 3; expert 1 is like 3.
    saliency, similarity = torch.tensor([0.4, 0.1, 0.2, 0.3]), torch.zeros(4, 4)
    similarity[1, 3] = similarity[3, 1] = 1.0
    groups = group_around_dominant_experts(saliency, similarity, 2, num_partitions=2)
    assert groups.dominant_of_group.tolist() == [0, 3]
    assert groups.group_of_expert.tolist() == [0, 1, 0, 1]


def test_dropping_keeps_the_most_salient_experts_and_marks_the_others():
    saliency = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
    groups = drop_the_least_salient(saliency, None, num_groups=3)
    assert groups.dominant_of_group.tolist() == [1, 3, 4]
    assert groups.group_of_expert.tolist() == [-1, 0, -1, 1, 2]


def test_dropping_by_partition_keeps_the_same_number_of_each():
    saliency = torch.tensor([0.4, 0.3, 0.2, 0.0, 0.1, 0.0])  # runs {0, 1, 2} and {3, 4, 5}
    groups = drop_the_least_salient(saliency, None, num_groups=2, num_partitions=2)
    assert groups.dominant_of_group.tolist() == [0, 4]
    assert groups.group_of_expert.tolist() == [0, -1, -1, -1, 1, -1]


@pytest.mark.parametrize("name", GROUPINGS)
def test_keeping_all_experts_leaves_each_alone_in_its_place(name):
    generator = torch.Generator().manual_seed(0)
    groups = GROUPING[name](torch.rand(6, generator=generator), symmetric(6, generator), 6, 1)
    assert groups.dominant_of_group.tolist() == list(range(6))
    assert groups.group_of_expert.tolist() == list(range(6))


@pytest.mark.parametrize("name", GROUPINGS)
def test_every_grouping_makes_as_many_groups_as_asked_for(name):
    generator = torch.Generator().manual_seed(0)
    saliency = torch.tensor([0.0, 3.0, 0.0, 1.0, 1.0, 2.0, 0.0, 0.0]).double()
    similarity = symmetric(8, generator)
    for num_groups in range(1, 9):
        assert GROUPING[name](saliency, similarity, num_groups, 1).num_groups == num_groups
    assert GROUPING[name](saliency, similarity, 4, 2).num_groups == 4


@pytest.mark.parametrize("num_groups, num_partitions", [(0, 1), (7, 1), (-1, 1), (3, 2)])
def test_an_impossible_number_of_groups_is_refused(num_groups, num_partitions):
    message = f"num_groups is {num_groups}, it must be in 1..6 and a multiple of {num_partitions}"
    with pytest.raises(ValueError, match=message):
        choose_dominant(torch.rand(6), num_groups, num_partitions)


def test_the_saliency_is_left_alone():
    saliency, similarity = torch.tensor([1.0, 3.0, 2.0]), torch.ones(3, 3)
    group_around_dominant_experts(saliency, similarity, 2)
    assert saliency.tolist() == [1.0, 3.0, 2.0]
    assert torch.equal(similarity, torch.ones(3, 3))
