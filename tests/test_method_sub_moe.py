"""Sub-MoE against its formulas written out: token cosines, K-means, joint SVD, the budget of two layers."""

import itertools

import numpy as np
import pytest
import torch
from method_models import MODELS, NUM_EXPERTS, assert_experts_close, experts_now, method_model, seen_by_layers

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.allocation.joint_kmeans import allocate_by_joint_kmeans, clusters_of_layers
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.grouping.kmeans import group_by_kmeans
from hf_mcsmoe.merging.joint_svd import merge_by_joint_svd
from hf_mcsmoe.merging.weighted_average import merge_by_weighted_average
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.solvers.kmeans import kmeans, without_empty
from hf_mcsmoe.types import ExpertWeights, LayerStatistics


def slow_similarity(seen):
    """Mean over tokens of the cosine, pair by pair."""
    outputs = [seen.output(e) for e in range(len(seen.weights.up))]
    units = [torch.stack([y / y.norm() for y in output]) for output in outputs]
    return torch.tensor([[(a * b).sum(1).mean().item() for b in units] for a in units], dtype=torch.float64)


def inertia(points, label):
    total = 0.0
    for cluster in set(label):
        members = points[[place for place, of in enumerate(label) if of == cluster]]
        total += (members - members.mean(dim=0)).square().sum().item()
    return total


def partitions(num_items, num_clusters):
    """All labels in which clusters are numbered by their first items and none is empty."""
    for label in itertools.product(range(num_clusters), repeat=num_items):
        seen = -1
        for of in label:
            if of > seen + 1:
                break
            seen = max(seen, of)
        else:
            if seen == num_clusters - 1:
                yield label


def best_partition(points, num_clusters):
    return min(partitions(len(points), num_clusters), key=lambda label: inertia(points, label))


def slow_svd_merge(members, shares, rank=None):
    """[W_1 ... W_m] = U S [V_1 ... V_m]^T, merged = U S (sum of share_i V_i)^T, the first `rank` of each."""
    u, s, vt = torch.linalg.svd(torch.cat(list(members.double()), dim=1), full_matrices=False)
    rank = rank or len(s)
    blocks = vt[:rank].split(members.shape[2], dim=1)
    return u[:, :rank] @ torch.diag(s[:rank]) @ sum(share * block for share, block in zip(shares, blocks, strict=True))


def random_points(num_points, num_dimensions=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_points, num_dimensions, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_the_preset_is_the_method_of_the_paper(name, tokens):
    model, tokens = method_model(name), tokens[:8]
    seen = seen_by_layers(model, tokens)
    compress_moe(model, "sub-moe", calibration=load_calibration(tokens, held_out_fraction=0), progress=False)
    reports = model.compression_report.layers
    assert sum(report.num_experts_after for report in reports) == NUM_EXPERTS[name]  # half of two layers
    for of_layer, found, report in zip(seen, experts_now(model), reports, strict=True):
        similarity, label = slow_similarity(of_layer), report.group_of_expert
        num_groups = report.num_experts_after
        assert sorted(set(label)) == list(range(num_groups))
        if name == "mixtral":  # few enough for all partitions
            best = best_partition(similarity, num_groups)
            assert inertia(similarity, label) == pytest.approx(inertia(similarity, best), rel=1e-5)
        count, expected = of_layer.counts(), {key: [] for key in of_layer.weights.tensors()}
        for group in range(num_groups):
            members = [e for e, of in enumerate(label) if of == group]
            assert report.dominant_of_group[group] == max(members, key=lambda e: (count[e], -e))
            shares = [count[e] / sum(count[m] for m in members) for e in members]
            for key, tensor in of_layer.weights.tensors().items():
                expected[key].append(slow_svd_merge(tensor[members], shares))
        assert_experts_close(found, ExpertWeights(**{key: torch.stack(one) for key, one in expected.items()}))


def test_the_recipe_collects_cosines_alone_and_no_tokens():
    recipe = recipe_from_preset("sub-moe")
    assert recipe.statistics_needed() == {"every_expert_count", "output_cosine_sum", "selection_count"}
    assert not recipe.needs_inputs and recipe.layout == "mapped" and recipe.alignment is None
    native = recipe_from_preset("sub-moe", layout="native", allocation="uniform")
    assert native.grouping == "kmeans"


def test_the_seed_of_the_recipe_reaches_the_clustering(monkeypatch, tokens):
    seeds = []
    monkeypatch.setattr("hf_mcsmoe.grouping.kmeans.kmeans", lambda *args: seeds.append(args[2]) or kmeans(*args))
    monkeypatch.setattr("hf_mcsmoe.allocation.joint_kmeans.kmeans", lambda *a: seeds.append(a[2]) or kmeans(*a))
    recipe = recipe_from_preset("sub-moe", seed=7)
    compress_moe(method_model("mixtral"), recipe, calibration=tokens[:4], progress=False)
    assert seeds == [7, 7, 7]


# --- K-means


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_finds_the_best_of_all_partitions(seed):
    points = random_points(6, seed=seed)
    for number in range(1, 7):
        best = best_partition(points, number)
        assert kmeans(points, number, seed, num_starts=50).tolist() == list(best)


def test_clusters_that_are_far_apart_are_found_from_the_usual_number_of_starts():
    centres = 20 * torch.eye(5, dtype=torch.float64)
    points = torch.cat([centre + random_points(number, 5, number) for number, centre in enumerate(centres, 2)])
    expected = [cluster for cluster in range(5) for _ in range(cluster + 2)]
    assert kmeans(points, 5, seed=0).tolist() == expected


def test_kmeans_gives_the_same_labels_for_the_same_seed_and_numbers_them_by_first_points():
    points = random_points(40, 5)
    label = kmeans(points, 9, seed=3)
    assert torch.equal(label, kmeans(points, 9, seed=3))
    assert [label.tolist().index(cluster) for cluster in range(9)] == sorted(
        label.tolist().index(cluster) for cluster in range(9)
    )


def test_no_cluster_is_empty_where_points_are_equal():
    points = torch.ones(6, 2, dtype=torch.float64)
    points[5] = 4.0
    for number in range(1, 7):
        assert kmeans(points, number, seed=0).unique().tolist() == list(range(number))


def test_an_empty_cluster_takes_the_farthest_point_that_is_not_alone():
    # Point 3 is the farthest from its centre but alone there; of the others point 1 is.
    squared = np.array([[1.0, 99, 99], [4.0, 99, 99], [2.0, 99, 99], [99, 50.0, 99]])
    assert without_empty(np.array([0, 0, 0, 1]), squared).tolist() == [0, 2, 0, 1]


def test_groups_are_led_by_their_most_salient_members_in_ascending_order():
    similarity = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).double()[[2, 0, 3, 1, 4]][:, [2, 0, 3, 1, 4]]
    groups = group_by_kmeans(torch.tensor([0.1, 0.5, 0.2, 0.6, 0.2]), similarity, 2, seed=0)
    assert groups.dominant_of_group.tolist() == [2, 3] and groups.group_of_expert.tolist() == [0, 1, 0, 1, 0]


def test_partitions_are_clustered_alone():
    similarity = torch.block_diag(*[torch.ones(2, 2)] * 4).double()
    similarity[0, 6:] = similarity[6:, 0] = 5  # like an expert of the other run: does not matter
    groups = group_by_kmeans(torch.ones(8), similarity, 4, 2, seed=0)
    assert (groups.group_of_expert[:4] < 2).all() and (groups.group_of_expert[4:] >= 2).all()


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"num_starts is 0, it must be a whole number >= 1\. Leave it out for 10"):
        Recipe(grouping="kmeans", grouping_options={"num_starts": 0})
    with pytest.raises(ValueError, match="rank is 0, it must be a whole number >= 1"):
        Recipe(merging="joint_svd", merging_options={"rank": 0})
    with pytest.raises(ValueError, match=r"joint_layers is 1\.5, it must be a whole number >= 1"):
        Recipe(allocation="joint_kmeans", allocation_options={"joint_layers": 1.5})
    assert Recipe(merging="joint_svd", merging_options={"rank": None}).merging_options == {"rank": None}


# --- joint SVD


@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (5, 1)])
def test_without_a_rank_the_joint_svd_is_the_weighted_average(shape):
    members = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    importance = torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64)
    found = merge_by_joint_svd(members, importance)
    assert torch.equal(found, merge_by_weighted_average(members, importance))
    torch.testing.assert_close(found, slow_svd_merge(members, [0.75, 0.0, 0.25]).float())


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 99])
def test_with_a_rank_it_is_the_truncated_decomposition(rank):
    members = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    importance = torch.tensor([1.0, 4.0, 5.0], dtype=torch.float64)
    found = merge_by_joint_svd(members, importance, rank=rank)
    torch.testing.assert_close(found, slow_svd_merge(members, [0.1, 0.4, 0.5], rank).float())
    assert torch.linalg.matrix_rank(found) == min(rank, 4)


def test_a_bias_is_not_projected():
    members = torch.randn(4, 6, 1, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(4, dtype=torch.float64)
    assert torch.equal(merge_by_joint_svd(members, ones, rank=1), merge_by_weighted_average(members, ones))


# --- the budget


def statistics_of(similarity):
    count = torch.tensor(2.0, dtype=torch.float64)
    sums = {"output_cosine_sum": similarity.double() * 2, "every_expert_count": count}
    return LayerStatistics(9, torch.ones(len(similarity), dtype=torch.int64), sums)


def sizes_of(statistics):
    return [torch.zeros(len(one.selection_count)) for one in statistics]


ALIKE, APART = torch.full((4, 4), 0.9).fill_diagonal_(1.0), torch.eye(4)
PAIRS = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize(
    "similarities, budgets, joint, expected",
    [
        ([ALIKE, APART], [2, 2], 2, [1, 3]),
        ([APART, ALIKE], [3, 2], 2, [4, 1]),
        ([ALIKE, APART], [2, 2], 1, [2, 2]),
        ([PAIRS, ALIKE, APART], [1, 2, 3], 2, [2, 1, 3]),
        ([ALIKE, APART, PAIRS], [3, 2, 2], 3, [1, 4, 2]),
        ([APART, APART], [4, 4], 2, [4, 4]),
    ],
)
def test_layers_whose_experts_differ_get_more(similarities, budgets, joint, expected):
    statistics = [statistics_of(similarity) for similarity in similarities]
    found = allocate_by_joint_kmeans(
        sizes_of(statistics), budgets, statistics_of_layer=statistics, seed=0, joint_layers=joint
    )
    assert found == expected


@pytest.mark.parametrize("seed", range(4))
def test_every_run_of_layers_spends_its_budget_exactly_and_no_layer_goes_without(seed):
    generator = torch.Generator().manual_seed(seed)
    statistics = []
    for size in (4, 6, 8, 5, 3):
        vectors = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        units = vectors / vectors.norm(dim=1, keepdim=True)
        statistics.append(statistics_of(units @ units.T))
    for budgets in ([1, 1, 1, 1, 1], [2, 3, 4, 2, 1], [4, 6, 8, 5, 3]):
        found = allocate_by_joint_kmeans(sizes_of(statistics), budgets, statistics_of_layer=statistics, seed=seed)
        assert [sum(found[:2]), sum(found[2:4]), found[4]] == [sum(budgets[:2]), sum(budgets[2:4]), budgets[4]]
        assert all(1 <= kept <= size for kept, size in zip(found, (4, 6, 8, 5, 3), strict=True))


def test_keeping_all_needs_no_statistics():
    assert allocate_by_joint_kmeans([torch.zeros(4), torch.zeros(3)], [4, 3], statistics_of_layer=[], seed=0) == [4, 3]


def test_a_cluster_of_two_layers_counts_for_most_of_its_points():
    layers = torch.tensor([0, 0, 0, 1, 1, 1])
    assert clusters_of_layers(layers, torch.tensor([0, 1, 2, 2, 2, 3]), 2) == [2, 2]
    assert clusters_of_layers(layers, torch.tensor([0, 1, 2, 2, 3, 3]), 2) == [3, 1]  # a tie: the earlier layer
    assert clusters_of_layers(layers, torch.tensor([0, 1, 2, 2, 2, 2]), 3) == [1, 1, 1]  # nothing is left without
