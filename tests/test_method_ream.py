"""REAM against its formulas written out: saliency, similarity, pseudo-pruning, alignment, merge, sequential."""

import copy
import itertools

import pytest
import torch
from method_models import MODELS, NUM_EXPERTS, assert_experts_close, experts_now, method_model, seen_by_layers
from torch.nn.functional import silu

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.alignment.weights_and_activations import (
    activation_distances,
    align_by_weights_and_activations,
    distances,
    principal_components,
)
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.grouping.pseudo_pruning import group_by_pseudo_pruning
from hf_mcsmoe.merging.weighted_average_without_zeros import merge_by_weighted_average_without_zeros
from hf_mcsmoe.observation.layer_tokens import LayerTokens
from hf_mcsmoe.observation.token_batches import RoutedTokens
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.similarity.gated_outputs_and_logits import gated_output_and_logit_similarity
from hf_mcsmoe.types import ExpertGroups, ExpertWeights, LayerStatistics


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def slow_similarity(seen):
    """methods.md B.2, step 2, pair by pair."""
    num_experts = len(seen.weights.up)
    soft = torch.stack([z.exp() / z.exp().sum() for z in seen.logits])
    means = [(soft[:, e, None] * seen.output(e)).mean(dim=0) for e in range(num_experts)]
    columns = [seen.logits[:, e] / seen.logits[:, e].norm() for e in range(num_experts)]
    apart = torch.tensor([[(a - b).norm().item() for b in columns] for a in columns])
    of_outputs = torch.tensor([[(cosine(a, b) + 1) / 2 for b in means] for a in means])
    return (of_outputs + 1 - apart / apart.max()) / 2


def slow_groups(saliency, similarity, num_groups, size):
    """{leader: members}, one expert at a time."""
    ranked = sorted(range(len(saliency)), key=lambda e: (-saliency[e], e))
    leaders, free = ranked[:num_groups], sorted(ranked[num_groups:])
    groups = {}
    for leader in leaders:
        groups[leader] = []
        while free and len(groups[leader]) < size - 1:
            best = max(free, key=lambda e: (similarity[leader, e].item(), -e))
            groups[leader].append(best)
            free.remove(best)
    return groups


def slow_order(seen, saliency, leader, member, components=64):
    """The permutation of least cost, by trying all of them."""

    def rows(expert):
        w = seen.weights
        return torch.cat([w.gate[expert], w.up[expert], w.down[expert].T], dim=1) * saliency[expert]

    def of_length_one(matrix):
        return torch.stack([row / row.norm() for row in matrix])

    both = torch.cat([rows(leader), rows(member)])
    _, _, v = torch.linalg.svd(both - both.mean(dim=0), full_matrices=False)
    projected = of_length_one((both - both.mean(dim=0)) @ v[:components].T)
    width = len(projected) // 2
    acts = [of_length_one(seen.activations(e).T) for e in (leader, member)]
    cost = [
        [(acts[0][a] - acts[1][b]).norm() + (projected[a] - projected[width + b]).norm() for b in range(width)]
        for a in range(width)
    ]
    totals = {p: sum(cost[a][b].item() for a, b in enumerate(p)) for p in itertools.permutations(range(width))}
    return list(min(totals, key=totals.get))


def slow_ream(seen, saliency, num_groups, size=16):
    """(leaders ascending, merged experts) of one layer."""
    groups = slow_groups(saliency, slow_similarity(seen), num_groups, size)
    merged = {name: [] for name in ("gate", "up", "down")}
    for leader in sorted(groups):
        members = [leader, *groups[leader]]
        weight = {e: saliency[e] for e in members}
        least = min([w for w in weight.values() if w > 0] + [0.5])
        weight = {e: w or least for e, w in weight.items()} if len(members) > 1 else weight
        order = {e: slow_order(seen, saliency, leader, e) for e in groups[leader]}
        order[leader] = list(range(seen.weights.width))
        for name in merged:
            tensors = {e: getattr(seen.weights, name)[e] for e in members}
            moved = {e: t[:, order[e]] if name == "down" else t[order[e]] for e, t in tensors.items()}
            total = sum(weight.values())
            mean = sum(weight[e] / total * moved[e] for e in members) if len(members) > 1 else moved[leader]
            merged[name].append(mean)
    return sorted(groups), ExpertWeights(**{name: torch.stack(found) for name, found in merged.items()})


@pytest.fixture(params=MODELS)
def narrow(request):
    """One layer of experts with 4 neurons, so that all orders can be tried; one expert that is hardly ever used."""
    width = "intermediate_size" if request.param == "mixtral" else "moe_intermediate_size"
    return request.param, method_model(request.param, **{width: 4})


def test_the_preset_is_the_method_on_one_layer_after_the_other(narrow, tokens):
    name, model = narrow
    tokens = tokens[:8]
    originals, half = copy.deepcopy(model), NUM_EXPERTS[name] // 2
    data = load_calibration(tokens, held_out_fraction=0)
    compress_moe(model, "ream", calibration=data, progress=False)
    routers = [seen.layer.router for seen in seen_by_layers(originals, tokens)]
    layers = [seen.layer for seen in seen_by_layers(model, tokens)]
    found = experts_now(model)
    for number, report in enumerate(model.compression_report.layers):
        if number:  # the second layer saw what the first one became
            experts, router = layers[number - 1].experts, layers[number - 1].router
            seen_by_layers(originals, tokens)[number - 1].layer.block.experts = experts
            seen_by_layers(originals, tokens)[number - 1].layer.block.gate = router
        seen = seen_by_layers(originals, tokens)[number]
        saliency = seen.routed_mean_norms()
        leaders, expected = slow_ream(seen, saliency, half)
        assert report.dominant_of_group == leaders
        assert_experts_close(found[number], expected)
        assert torch.equal(layers[number].router.weight, routers[number].weight[leaders])


def test_the_recipe_is_sequential_and_native():
    recipe = recipe_from_preset("ream")
    assert recipe.sequential and recipe.layout == "native" and recipe.needs_inputs
    assert recipe.statistics_needed() == {
        "selection_count",
        "gated_output_norm_sum",
        "soft_gated_output_sum",
        "logit_gram",
    }
    assert recipe_from_preset("ream", grouping_options={"group_size": 32}).grouping_options == {"group_size": 32}


def test_the_similarity_worked_by_hand():
    # Outputs at 0 and 90 degrees and zero: cosines 0. Logit columns e1, -e1 and zero: distances 2, 1 and 1.
    sums = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    gram = torch.tensor([[4.0, -2.0, 0.0], [-2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    statistics = LayerStatistics(1, torch.ones(3), {"soft_gated_output_sum": sums, "logit_gram": gram})
    found = gated_output_and_logit_similarity(statistics, None)
    expected = [[1.0, 0.25, 0.5], [0.25, 1.0, 0.5], [0.5, 0.5, 1.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_logit_columns_that_all_point_the_same_way_are_all_alike():
    ones = torch.ones(3, 3, dtype=torch.float64)
    sums = torch.eye(3, dtype=torch.float64)
    statistics = LayerStatistics(1, torch.ones(3), {"soft_gated_output_sum": sums, "logit_gram": ones})
    found = gated_output_and_logit_similarity(statistics, None)
    torch.testing.assert_close(found, 0.75 * ones + 0.25 * torch.eye(3))


# Ranked 4, 1, 5, 0, 2, 3. Expert 2 is most like 5, but leader 4 comes first.
SALIENCY = torch.tensor([0.2, 0.8, 0.1, 0.05, 0.9, 0.7], dtype=torch.float64)
ALIKE = torch.zeros(6, 6, dtype=torch.float64)
for _a, _b, _s in ((4, 0, 0.3), (4, 2, 0.5), (4, 3, 0.3), (1, 3, 0.9), (5, 2, 0.9), (1, 0, 0.8)):
    ALIKE[_a, _b] = ALIKE[_b, _a] = _s


def test_pseudo_pruning_worked_by_hand():
    # Leaders 1, 4, 5. Groups of two: 4 takes 2, then 1 takes 3 (0.9 before 0.8), then 5 takes 0, which is left.
    found = group_by_pseudo_pruning(SALIENCY, ALIKE, 3, group_size=2)
    assert found.dominant_of_group.tolist() == [1, 4, 5]
    assert found.group_of_expert.tolist() == [2, 0, 1, 0, 1, 2]
    # Groups of three: 4 takes 2 and, of 0 and 3 that tie, the lower one; 1 takes 3; 5 stays as it is.
    found = group_by_pseudo_pruning(SALIENCY, ALIKE, 3, group_size=3)
    assert found.group_of_expert.tolist() == [1, 0, 1, 0, 1, 2]
    # All into the largest group, as by default; 0 gives each to the most similar leader.
    assert group_by_pseudo_pruning(SALIENCY, ALIKE, 3).group_of_expert.tolist() == [1, 0, 1, 1, 1, 2]
    assert group_by_pseudo_pruning(SALIENCY, ALIKE, 3, group_size=0).group_of_expert.tolist() == [0, 0, 2, 0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_pseudo_pruning_equals_the_slow_reference(seed):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.randint(0, 4, (10,), generator=generator).double()
    similarity = torch.randint(0, 5, (10, 10), generator=generator).double()
    similarity = similarity + similarity.T
    for num_groups, size in itertools.product((2, 4, 7, 10), (2, 3, 5, 16)):
        if num_groups * size < 10:
            continue
        found = group_by_pseudo_pruning(saliency, similarity, num_groups, group_size=size)
        slow = slow_groups(saliency.tolist(), similarity, num_groups, size)
        assert {
            leader: found.members(group)[1:].tolist() for group, leader in enumerate(found.dominant_of_group.tolist())
        } == {leader: sorted(members) for leader, members in slow.items()}


def test_groups_that_cannot_hold_all_experts_are_refused_before_the_model_runs(tokens):
    message = r"group_size is 3, but 2 groups of 3 cannot hold 8 experts\. Use at least 4, or 0"
    with pytest.raises(ValueError, match=message):
        group_by_pseudo_pruning(torch.ones(8), torch.ones(8, 8), 2, group_size=3)
    model = method_model("mixtral")
    model.forward = None  # whatever runs it fails
    recipe = recipe_from_preset("ream", num_experts=2, grouping_options={"group_size": 3})
    with pytest.raises(ValueError, match=message):
        compress_moe(model, recipe, calibration=tokens, progress=False)


@pytest.mark.parametrize("value", [-1, 2.5, True, "16"])
def test_a_group_size_that_cannot_be_is_refused(value):
    with pytest.raises(ValueError, match=r"group_size is .*, it must be a whole number >= 0"):
        Recipe(grouping="pseudo_pruning", grouping_options={"group_size": value})
    with pytest.raises(ValueError, match=r"components is .*, it must be a whole number >= 1"):
        Recipe(alignment="weights_and_activations", alignment_options={"components": -1})


@pytest.mark.parametrize(
    "importance, weights",
    [
        ([2.0, 0.0, 6.0], [2.0, 0.5, 6.0]),
        ([0.2, 0.0, 0.4], [0.2, 0.2, 0.4]),
        ([3.0, 1.0, 0.0], [3.0, 1.0, 0.5]),
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
    ],
)
def test_an_importance_of_zero_counts_as_the_least_but_at_most_a_half(importance, weights):
    members = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    found = merge_by_weighted_average_without_zeros(members, torch.tensor(importance, dtype=torch.float64))
    expected = sum(w / sum(weights) * member for w, member in zip(weights, members, strict=True))
    torch.testing.assert_close(found, expected)


# --- alignment

GROUPS = ExpertGroups(torch.tensor([1, 0, 1, 1, -1]), torch.tensor([1, 2]))


def random_layer(width=4, hidden=6, seed=0, num_experts=5):
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, num_experts, width, hidden, generator=generator)
    return ExpertWeights(gate=gate, up=up, down=torch.randn(num_experts, hidden, width, generator=generator))


def layer_tokens(num_tokens=30, hidden=6, num_experts=5, seed=1):
    states = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(seed))
    kept = [
        RoutedTokens(part, torch.zeros(len(part), num_experts), torch.zeros(len(part), hidden))
        for part in states.split(13)
    ]
    return LayerTokens(lambda up, gate: silu(gate) * up, torch.eye(num_experts), kept, [])


def statistics(norms=(1.0, 2.0, 0.5, 3.0, 0.0)):
    count = torch.tensor([1 if norm else 0 for norm in norms])
    return LayerStatistics(9, count, {"gated_output_norm_sum": torch.tensor(norms, dtype=torch.float64)})


def align(weights, **options):
    return align_by_weights_and_activations(weights, GROUPS, tokens=layer_tokens(), statistics=statistics(), **options)


def test_a_planted_order_is_found_and_leaders_loners_and_dropped_experts_stay():
    generator = torch.Generator().manual_seed(3)
    one = random_layer(width=9, num_experts=1)
    same = ExpertWeights(**{name: t.expand(5, -1, -1) for name, t in one.tensors().items()})
    planted = torch.stack([torch.randperm(9, generator=generator) for _ in range(5)])
    planted[2] = torch.arange(9)  # the leader
    order = align(same.permute_neurons(planted))
    for expert in (0, 3):
        assert torch.equal(planted[expert][order[expert]], torch.arange(9))
    for expert in (1, 2, 4):
        assert torch.equal(order[expert], torch.arange(9))


def test_the_result_does_not_depend_on_the_order_of_the_neurons_of_any_expert():
    weights = random_layer(width=7)
    moved = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(seed)) for seed in range(5)])
    before, after = align(weights), align(weights.permute_neurons(moved))
    for expert in (0, 3):
        assert torch.equal(moved[expert][after[expert]], before[expert][moved[2]])


def test_activations_decide_where_weights_tie_and_are_those_of_the_same_tokens():
    # Neurons of the member are minus those of the leader: all weights are as far apart as can be, in any order, once
    # only one component is left; on the same tokens SiLU keeps them apart.
    weights = random_layer(width=6)
    for tensor in weights.tensors().values():
        tensor[0] = tensor[2]
    flipped = weights.permute_neurons(torch.tensor([[5, 4, 3, 2, 1, 0], *[[0, 1, 2, 3, 4, 5]] * 4]))
    assert align(flipped, components=1)[0].tolist() == [5, 4, 3, 2, 1, 0]


def test_weights_decide_where_activations_say_nothing():
    weights = random_layer(width=6)
    for tensor in weights.tensors().values():
        tensor[0] = tensor[2]
    planted = torch.tensor([[3, 5, 0, 1, 4, 2], *[[0, 1, 2, 3, 4, 5]] * 4])
    silent = layer_tokens()
    for batch in silent.calibration:
        batch.hidden_states.zero_()
    how = {"tokens": silent, "statistics": statistics()}
    order = align_by_weights_and_activations(weights.permute_neurons(planted), GROUPS, **how)
    assert planted[0][order[0]].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_sums_take_the_memory_that_they_say():
    weights = random_layer(width=7)
    found = activation_distances(weights, 2, [0, 3], layer_tokens(), 20)
    assert [(one.shape, one.dtype) for one in found] == [((7, 7), torch.float64)] * 2
    scores = principal_components(weights.neurons(0), weights.neurons(1), 64)
    assert [one.shape for one in scores] == [(7, 14)] * 2  # no more than 2 I vectors span
    assert [one.shape for one in principal_components(weights.neurons(0), weights.neurons(1), 3)] == [(7, 3)] * 2


@pytest.mark.parametrize("shape", [(4, 12), (9, 3)])
@pytest.mark.parametrize("components", [1, 2, 64])
def test_principal_components_are_those_of_both_sets_around_their_mean(shape, components):
    generator = torch.Generator().manual_seed(0)
    a, b = 2 + torch.randn(2, *shape, generator=generator)
    both = torch.cat([a, b]).double()
    centred = both - both.mean(dim=0)
    kept = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:components].T
    found = torch.cat(principal_components(a, b, components))
    torch.testing.assert_close(found @ found.T, kept @ kept.T)  # but for the sign of each


def test_distances_of_units_and_of_zeros():
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    found = distances(a.square().sum(1), a.square().sum(1), a @ a.T)
    expected = torch.tensor([[0.0, 1.0, 0.4**0.5], [1.0, 0.0, 1.0], [0.4**0.5, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
