"""moe-i2: subset search, ranks by importance, and the whole method against a slow reference."""

import itertools
import math

import numpy as np
import pytest
import torch

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.grouping import GROUPING
from hf_mcsmoe.modeling.densify import densify
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.outcome import count
from hf_mcsmoe.planning import plan
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.saliency import SALIENCY
from hf_mcsmoe.sizes import measure
from hf_mcsmoe.solvers.apportion import apportion
from hf_mcsmoe.types import LayerStatistics

MODELS = {"mixtral": {}, "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4}}


def random_gram(size, seed):
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T


def search(gram, num_groups, saliency=None, partitions=1, seed=0, **options):
    saliency = torch.arange(len(gram), 0, -1).double() if saliency is None else saliency
    statistics = LayerStatistics(1, torch.ones(len(gram), dtype=torch.int64), {"chosen_gram": gram})
    supply = {"statistics": lambda: statistics, "seed": lambda: seed}
    how = {"options": options, "supply": supply}
    return GROUPING.call("genetic_subset", saliency, None, num_groups, partitions, **how)


def error(gram, kept):
    dropped = [e for e in range(len(gram)) if e not in kept]
    return sum(gram[i, j].item() for i in dropped for j in dropped)


def kept_of(groups):
    assert (groups.group_of_expert >= 0).sum() == groups.num_groups
    return groups.dominant_of_group.tolist()


# --- subsets


@pytest.mark.parametrize("num_groups", [1, 3, 6, 7])
def test_few_subsets_are_all_tried(num_groups):
    gram = random_gram(7, num_groups)
    best = min(itertools.combinations(range(7), num_groups), key=lambda kept: error(gram, kept))
    assert kept_of(search(gram, num_groups)) == list(best)


def test_ties_keep_the_lower_experts():
    assert kept_of(search(torch.eye(6, dtype=torch.float64), 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_of_many_subsets(seed):
    gram = random_gram(12, seed)
    best = min(error(gram, kept) for kept in itertools.combinations(range(12), 5))
    found = kept_of(search(gram, 5, seed=seed, exact_subsets=0))
    assert error(gram, found) == pytest.approx(best)
    assert kept_of(search(gram, 5, seed=seed, exact_subsets=0)) == found


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_the_search_is_never_worse_than_the_saliency(iterations):
    gram = torch.diag(torch.arange(1, 41).double())
    saliency = torch.arange(1, 41).double()  # knows the answer
    found = search(gram, 10, saliency, exact_subsets=0, population=4, iterations=iterations)
    assert kept_of(found) == list(range(30, 40))


def test_generations_improve_and_mutations_escape():
    gram, worst = random_gram(40, 7), torch.zeros(40)
    errors = [
        error(gram, kept_of(search(gram, 20, worst, exact_subsets=0, population=20, iterations=steps)))
        for steps in (0, 5, 60)
    ]
    assert errors[0] > errors[1] > errors[2]
    stuck = search(gram, 20, worst, exact_subsets=0, population=2, iterations=60, mutation=0.0)
    freed = search(gram, 20, worst, exact_subsets=0, population=2, iterations=60, mutation=1.0)
    assert error(gram, kept_of(freed)) < error(gram, kept_of(stuck))


@pytest.mark.parametrize("exact", [0, 10**6])
def test_every_run_of_a_group_limited_router_keeps_as_many(exact):
    gram = random_gram(12, 3)
    pairs = itertools.combinations(range(4), 2)
    choices = itertools.product(list(pairs), repeat=3)
    best = min(error(gram, [4 * r + e for r, run in enumerate(runs) for e in run]) for runs in choices)
    kept = kept_of(search(gram, 6, partitions=3, exact_subsets=exact))
    assert [sum(e // 4 == run for e in kept) for run in range(3)] == [2, 2, 2]
    assert error(gram, kept) == pytest.approx(best)
    with pytest.raises(ValueError, match="num_groups is 5, it must be a multiple of 3"):
        search(gram, 5, partitions=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"population": 1}, "population is 1, it must be a whole number >= 2"),
        ({"iterations": -1}, "iterations is -1, it must be a whole number >= 0"),
        ({"mutation": 1.5}, r"mutation is 1.5, it must be in \[0, 1\]"),
    ],
)
def test_searches_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(grouping="genetic_subset", similarity=None, grouping_options=options)


# --- ranks


def test_ranks_are_in_proportion_within_bounds_and_exact():
    assert apportion([4, 2, 1, 1], 16, 1, 16) == [8, 4, 2, 2]
    assert apportion([4, 2, 1, 1], 16, 1, 6) == [6, 5, 3, 2]  # by hand: 2 left over, at 2/9 and 1/5 a seat
    assert apportion([1, 0, 0], 5, 1, 9) == [3, 1, 1]
    assert apportion([1, 0, 0], 8, 1, 4) == [4, 2, 2]
    assert apportion([0, 0], 4, 1, 4) == [2, 2]
    with pytest.raises(ValueError, match=r"total is 9, 2 numbers in 1..4 cannot"):
        apportion([1, 1], 9, 1, 4)


def test_webster_has_no_cheaper_exchange():
    weights = (torch.rand(6, generator=torch.Generator().manual_seed(0)) ** 3).tolist()
    for total in (6, 17, 40, 59):
        found = apportion(weights, total, 1, 10)
        assert sum(found) == total and all(1 <= n <= 10 for n in found)
        for a, b in itertools.permutations(range(6), 2):
            if found[a] > 1 and found[b] < 10:
                assert weights[a] / (2 * found[a] - 1) >= weights[b] / (2 * found[b] + 1)


# --- the whole method


def slow_method(model, data, keep):
    """Layer by layer: kept experts and dense matrices, with loops, from the description of the method."""
    layers = find_layers(model)
    inputs, found = {}, []
    hooks = [
        layer.experts.register_forward_pre_hook(
            lambda _, args, name=layer.name: inputs.setdefault(name, []).append(args)
        )
        for layer in layers
    ]
    with torch.no_grad():
        for batch in data.batches:
            if not batch.held_out:
                model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    changes, pairs = [], []
    for layer in layers:
        outputs = []  # of each expert alone, with its gate: (N, T D)
        for expert in range(layer.num_slots):
            alone = [(h, index, w * (index == expert)) for h, index, w in inputs[layer.name]]
            given = [layer.family.run_experts(layer, *one).detach().double().flatten() for one in alone]
            outputs.append(torch.cat(given))
        outputs = torch.stack(outputs)
        changes.append(outputs.norm(dim=1))
        pairs.append(outputs @ outputs.T)
    slots = layers[0].num_slots
    mean = math.floor(math.sqrt(keep) * slots + 0.5)
    gone = [0] * len(layers)
    for _ in range(len(layers) * (slots - mean)):
        prices = [
            (changes[at].sum().item() * (2 * gone[at] + 1), at) for at in range(len(layers)) if gone[at] < slots - 1
        ]
        gone[min(prices)[1]] += 1
    for at, layer in enumerate(layers):
        kept = min(itertools.combinations(range(slots), slots - gone[at]), key=lambda k: error(pairs[at].numpy(), k))
        width, hidden = layer.intermediate_size, layer.hidden_size
        rank = math.floor(keep * slots / mean * width * hidden / (width + hidden))
        ranks = [1] * len(kept)
        for _ in range(len(kept) * (rank - 1)):
            scores = [
                (-changes[at][e].item() / (2 * ranks[i] + 1), i)
                for i, e in enumerate(kept)
                if ranks[i] < min(width, hidden)
            ]
            ranks[min(scores)[1]] += 1
        found.append((list(kept), ranks))
    return found


@pytest.mark.parametrize("family", MODELS)
def test_moe_i2_is_what_its_description_says(family, original, tokens):
    model = original(family, **MODELS[family])
    data = load_calibration(tokens, None)
    expected = slow_method(model, data, 0.5)
    original_weights = [
        layer.family.view(layer, {n: p.detach().clone() for n, p in layer.expert_parameters.items()})
        for layer in find_layers(model)
    ]
    result = compress_moe(model, recipe_from_preset("moe-i2", keep=0.5), calibration=data, progress=False)
    for report, (kept, ranks), weights in zip(
        result.compression_report.layers, expected, original_weights, strict=True
    ):
        assert report.dominant_of_group == kept
        experts = form_layers(result)[report.layer]
        for name in ("gate", "up", "down"):
            assert getattr(experts, f"{name}_rank_offsets").diff().tolist() == ranks
            for at, (expert, rank) in enumerate(zip(kept, ranks, strict=True)):
                u, s, v = np.linalg.svd(getattr(weights, name)[expert].numpy())
                got = getattr(experts.densify(), name)[at].detach().numpy()
                np.testing.assert_allclose(got, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-3, atol=1e-5)
        assert len(set(ranks)) > 1


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "switch_transformers"])
def test_plan_report_and_model_agree_and_the_budget_is_kept(family, original, tokens):
    recipe = recipe_from_preset("moe-i2", keep=0.4, keep_experts=0.75)
    result = compress_moe(original(family), recipe, calibration=tokens, progress=False)
    planned, report = plan(original(family), recipe), result.compression_report
    assert count(result) == (report.total_parameters_after, report.total_bytes_after)
    assert report.total_parameters_after == planned.total_parameters_after
    assert sum(r.parameters_after for r in report.layers) == planned.expert_parameters_after
    assert measure(result, []).total_bytes == planned.total_bytes_after
    assert sum(r.num_experts_after for r in report.layers) == 6 * len(report.layers)
    biases = 3 * 8 * 100 if family == "gpt_oss" else 0
    assert planned.expert_parameters_after <= 0.4 * planned.expert_parameters_before + biases
    assert planned.expert_parameters_after >= 0.36 * planned.expert_parameters_before
    dense = result(tokens[:2], **({"decoder_input_ids": tokens[:2]} if family.startswith("switch") else {})).logits
    densify(result)
    again = result(tokens[:2], **({"decoder_input_ids": tokens[:2]} if family.startswith("switch") else {})).logits
    torch.testing.assert_close(again, dense, rtol=1e-4, atol=1e-5)


def test_the_error_of_dropping_is_what_the_search_minimised(original, tokens):
    # Without ranks to cut (keep = keep_experts) the held-out error is that of the subset alone.
    recipe = Recipe(keep=0.5, similarity=None, grouping="genetic_subset", alignment=None, merging=None)
    plain = Recipe(keep=0.5, similarity=None, grouping="drop", alignment=None, merging=None)
    data = load_calibration(tokens, None, held_out_fraction=0.25)
    errors = []
    for one in (recipe, plain):
        result = compress_moe(original("mixtral"), one, calibration=data, progress=False)
        errors.append(sum(r.relative_error for r in result.compression_report.layers))
    assert errors[0] < errors[1]


def test_saliency_is_the_root_of_the_energy_and_unused_experts_are_zero():
    gram = torch.tensor([[4.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 9.0]], dtype=torch.float64)
    sums = {"chosen_gram": gram}
    statistics = LayerStatistics(3, torch.tensor([2, 0, 1]), sums)
    assert SALIENCY["left_out_change"](statistics, None).tolist() == [2.0, 0.0, 3.0]


# --- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_experts": 4}, "num_experts is 4, but decomposition 'importance_ranked' keeps ranks.*keep_experts"),
        ({"keep": 0.5, "keep_experts": 0.4}, r"keep_experts is 0.4, it must be in \[keep, 1\]"),
        ({"decomposition_options": {"rank": 4}}, "has no option 'rank': ranks follow from keep"),
        ({"layout": "native"}, "decomposition needs layout 'mapped'"),
    ],
)
def test_ranked_recipes_refuse_what_does_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"decomposition": "importance_ranked", **fields})


def test_budgets_of_ranked_recipes():
    recipe = Recipe(keep=0.5, decomposition="importance_ranked")
    assert recipe.experts_per_layer(16) == 11 and recipe.decomposes(16)
    assert recipe.mean_rank(16, (24, 32)) == math.floor(8 / 11 * 24 * 32 / 56)
    assert not Recipe(keep=1.0, decomposition="importance_ranked").decomposes(8)
    only_experts = Recipe(keep=0.75, keep_experts=0.75, decomposition="importance_ranked")
    assert only_experts.experts_per_layer(8) == 6 and not only_experts.decomposes(8)
    assert Recipe(keep=0.5, decomposition="low_rank_sparse").decomposes(8) and not Recipe().decomposes(8)
