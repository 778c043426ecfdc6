"""HC-SMoE against its formulas written out: mean outputs, average linkage, frequency-weighted mean."""

import itertools

import pytest
import torch
from method_models import (
    MODELS,
    NUM_EXPERTS,
    assert_experts_close,
    experts_now,
    method_model,
    seen_by_layers,
    slow_clusters,
)

from hf_mcsmoe import Recipe, calibrate_moe, compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors.in_memory import collect_statistics
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.grouping.hierarchical import group_by_hierarchical_clustering
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.similarity.expert_outputs import mean_output_similarity
from hf_mcsmoe.solvers.agglomerative import LINKAGES, cluster_by_distance
from hf_mcsmoe.types import ExpertWeights, LayerStatistics


def slow_leader(points, members, frequency):
    """The member next to the mean of the members; the more used one of two that are equally near."""
    centre = points[members].mean(dim=0)
    return min(members, key=lambda e: (round((points[e] - centre).norm().item(), 9), -frequency[e], e))


def members_of(groups):
    return [sorted(groups.members(group).tolist()) for group in range(groups.num_groups)]


def random_points(num_points, seed=0):
    return torch.randn(num_points, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(points):
    return torch.tensor([[(a - b).norm().item() for b in points] for a in points], dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_the_preset_is_the_method_of_the_paper(name, tokens):
    model = method_model(name)
    seen, half = seen_by_layers(model, tokens), NUM_EXPERTS[name] // 2
    compress_moe(model, "hc-smoe", calibration=load_calibration(tokens, held_out_fraction=0), progress=False)
    for of_layer, found, report in zip(seen, experts_now(model), model.compression_report.layers, strict=True):
        points = torch.stack([of_layer.output(e).mean(dim=0) for e in range(NUM_EXPERTS[name])])
        frequency = [count / sum(of_layer.counts()) for count in of_layer.counts()]
        clusters = slow_clusters(distances(points), half)
        assert max(map(len, clusters)) > 2
        led = sorted((slow_leader(points, members, frequency), members) for members in clusters)
        assert report.dominant_of_group == [leader for leader, _ in led]
        assert [
            [e for e, group in enumerate(report.group_of_expert) if group == number] for number in range(half)
        ] == [members for _, members in led]
        expected = {}
        for key, tensor in of_layer.weights.tensors().items():
            means = []
            for _, members in led:
                total = sum(frequency[e] for e in members)
                means.append(sum(frequency[e] / total * tensor[e] for e in members))
            expected[key] = torch.stack(means)
        assert_experts_close(found, ExpertWeights(**expected))


def test_the_recipe_is_mapped_unaligned_and_uniform():
    recipe = recipe_from_preset("hc-smoe")
    assert (recipe.layout, recipe.allocation, recipe.alignment) == ("mapped", "uniform", None)
    assert recipe.statistics_needed() == {"every_output_sum", "every_expert_count", "selection_count"}
    assert not recipe.needs_inputs and not recipe.sequential


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(4))
def test_clusters_equal_those_of_the_definition(linkage, seed):
    distance = distances(random_points(9, seed))
    for number in range(1, 10):
        label = cluster_by_distance(distance, number, linkage)
        found = [(label == cluster).nonzero().flatten().tolist() for cluster in range(number)]
        assert found == slow_clusters(distance, number, linkage)


def test_linkages_worked_by_hand():
    # On a line: 0, 1, 2.2, 5, 5.9. {5, 5.9} joins first, then {0, 1}; then 2.2 has the average distance 1.7 to
    # {0, 1} and 3.25 to {5, 5.9}.
    distance = distances(torch.tensor([[0.0], [1.0], [2.2], [5.0], [5.9]]))
    assert cluster_by_distance(distance, 3).tolist() == [0, 0, 1, 2, 2]
    assert cluster_by_distance(distance, 2).tolist() == [0, 0, 0, 1, 1]
    # A chain 0, 1, 2.1, 3.3 and the pair 9, 10.25: only "single" joins the whole chain before the pair.
    distance = distances(torch.tensor([[0.0], [1.0], [2.1], [3.3], [9.0], [10.25]]))
    assert cluster_by_distance(distance, 3, "single").tolist() == [0, 0, 0, 0, 1, 2]
    assert cluster_by_distance(distance, 3, "complete").tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("linkage", LINKAGES)
def test_the_number_of_clusters_is_exact_where_all_distances_tie(linkage):
    distance = torch.ones(7, 7, dtype=torch.float64) - torch.eye(7)
    for number in range(1, 8):
        label = cluster_by_distance(distance, number, linkage)
        assert sorted(set(label.tolist())) == list(range(number))
        assert torch.equal(label, cluster_by_distance(distance, number, linkage))


def test_a_constant_added_to_all_similarities_changes_nothing():
    similarity, saliency = -distances(random_points(8)), torch.rand(8)
    for number in range(1, 9):
        left = group_by_hierarchical_clustering(saliency, similarity, number)
        right = group_by_hierarchical_clustering(saliency, similarity + 3, number)
        assert torch.equal(left.group_of_expert, right.group_of_expert)
        assert torch.equal(left.dominant_of_group, right.dominant_of_group)


def test_the_leader_is_next_to_the_centre_and_the_more_salient_of_two():
    # {0, 2, 1} with expert 2 in the middle; {3, 4}, of which expert 4 is used more.
    points = torch.tensor([[0.0], [2.0], [1.1], [9.0], [10.0]])
    saliency = torch.tensor([0.9, 0.8, 0.1, 0.2, 0.3])
    groups = group_by_hierarchical_clustering(saliency, -distances(points), 2)
    assert groups.dominant_of_group.tolist() == [2, 4] and groups.group_of_expert.tolist() == [0, 0, 0, 1, 1]
    groups = group_by_hierarchical_clustering(torch.ones(5), -distances(points), 2)
    assert groups.dominant_of_group.tolist() == [2, 3]


def test_groups_are_in_the_order_of_their_leaders():
    points = torch.tensor([[0.0], [9.0], [9.5], [0.4], [0.2]])  # clusters {0, 3, 4} led by 4 and {1, 2} led by 1
    groups = group_by_hierarchical_clustering(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), -distances(points), 2)
    assert groups.dominant_of_group.tolist() == [1, 4]
    assert groups.group_of_expert.tolist() == [1, 0, 0, 1, 1]


def test_partitions_are_clustered_alone():
    points, saliency = random_points(12, 3), torch.rand(12)
    groups = group_by_hierarchical_clustering(saliency, -distances(points), 6, num_partitions=3)
    found = sorted(members_of(groups))
    expected = [
        [start + e for e in members]
        for start in (0, 4, 8)
        for members in slow_clusters(distances(points[start:][:4]), 2)
    ]
    assert found == sorted(expected)
    with pytest.raises(ValueError, match=r"num_groups is 5, it must be in 1\.\.12 and a multiple of 3"):
        group_by_hierarchical_clustering(saliency, -distances(points), 5, num_partitions=3)


def test_the_similarity_is_minus_the_distance_of_means():
    sums = torch.tensor([[6.0, 8.0], [0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    counted = {"every_output_sum": sums, "every_expert_count": torch.tensor(2.0, dtype=torch.float64)}
    similarity = mean_output_similarity(LayerStatistics(9, torch.zeros(3, dtype=torch.int64), counted), None)
    expected = [[0.0, -5.0, -(20**0.5)], [-5.0, 0.0, -1.0], [-(20**0.5), -1.0, 0.0]]
    torch.testing.assert_close(similarity, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_every_expert_equal_those_of_all_tokens_and_take_the_memory_that_they_say(name, tokens):
    model, tokens = method_model(name), tokens[:2]
    layers, num_experts, hidden = find_layers(model), NUM_EXPERTS[name], model.config.hidden_size
    needs = frozenset({"every_output_sum", "every_expert_count", "output_cosine_sum", "soft_gated_output_sum"})
    data = load_calibration(tokens, held_out_fraction=0)
    found, _ = collect_statistics(model, layers, data, needs, progress=False, every_expert_tokens=10_000)
    for of_layer in seen_by_layers(model, tokens):
        statistics = found[of_layer.layer.name]
        outputs = torch.stack([of_layer.output(e) for e in range(num_experts)])
        soft = torch.stack([z.exp() / z.exp().sum() for z in of_layer.logits])
        cosines = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        for one, other in itertools.product(range(num_experts), repeat=2):
            for a, b in zip(outputs[one], outputs[other], strict=True):
                cosines[one, other] += (a @ b) / (a.norm() * b.norm())
        close = {"rtol": 1e-4, "atol": 1e-5}
        assert statistics["every_expert_count"].item() == tokens.numel()
        torch.testing.assert_close(statistics["every_output_sum"], outputs.sum(1), **close)
        torch.testing.assert_close(statistics["output_cosine_sum"], cosines, **close)
        expected = torch.stack([sum(soft[t, e] * outputs[e, t] for t in range(len(soft))) for e in range(num_experts)])
        torch.testing.assert_close(statistics["soft_gated_output_sum"], expected, **close)
        sizes = {key: value.numel() for key, value in statistics.sums.items()}
        assert sizes == {
            "every_expert_count": 1,
            "every_output_sum": num_experts * hidden,
            "output_cosine_sum": num_experts**2,
            "soft_gated_output_sum": num_experts * hidden,
        }


def test_the_sample_of_tokens_is_bounded(tokens):
    model = method_model("mixtral")
    data = load_calibration(tokens, held_out_fraction=0, batch_size=8)  # three batches
    how = {"progress": False, "every_expert_tokens": 30}
    found, _ = collect_statistics(model, find_layers(model), data, frozenset({"every_expert_count"}), **how)
    assert [one["every_expert_count"].item() for one in found.values()] == [30, 30]


def test_statistics_of_one_run_serve_the_methods_of_every_expert_at_any_ratio(tokens, tmp_path):
    recipes = [recipe_from_preset(name, keep=keep) for name, keep in (("hc-smoe", 0.75), ("sub-moe", 0.25))]
    calibrate_moe(method_model("mixtral"), recipes, tmp_path / "stats", calibration=tokens[:6], progress=False)
    for recipe in recipes:
        results = [
            compress_moe(method_model("mixtral"), recipe, calibration=data, progress=False)
            for data in (tmp_path / "stats", tokens[:6])
        ]
        for saved, direct in zip(*map(experts_now, results), strict=True):
            assert all(torch.equal(tensor, direct.tensors()[name]) for name, tensor in saved.tensors().items())


def test_an_unknown_linkage_and_a_missing_similarity_are_refused():
    with pytest.raises(ValueError, match=r"linkage is 'averge', allowed are .*Did you mean 'average'"):
        Recipe(grouping="hierarchical", grouping_options={"linkage": "averge"})
    with pytest.raises(ValueError, match="grouping 'hierarchical' needs a similarity, got None"):
        Recipe(grouping="hierarchical", similarity=None)
