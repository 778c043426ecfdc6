"""Budgets from what leaving experts out does: the statistics, the two rules, and whole models."""

import itertools

import pytest
import torch

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.allocation import ALLOCATION
from hf_mcsmoe.allocation.error_curve import error_of_keeping
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors.accumulator import StatisticsAccumulator
from hf_mcsmoe.executors.in_memory import collect
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layouts import check_layout
from hf_mcsmoe.observation.layer_inputs import relative_error, routed_output
from hf_mcsmoe.types import LayerStatistics

DROP = {"similarity": None, "grouping": "drop", "alignment": None, "merging": None}


def statistics(gram):
    return LayerStatistics(1, torch.ones(len(gram), dtype=torch.int64), {"chosen_gram": gram})


def inverse(energies, budgets, **options):
    saliencies = [torch.zeros(len(row)) for row in energies]
    # What is off the diagonal does not matter for single experts.
    found = [
        statistics(torch.diag(torch.tensor(row, dtype=torch.float64)) - 1 + torch.eye(len(row))) for row in energies
    ]
    return ALLOCATION["inverse_sensitivity"](saliencies, budgets, statistics_of_layer=found, **options)


def curve(grams, saliencies, budgets, **options):
    found = [statistics(gram) for gram in grams]
    return ALLOCATION["error_curve"](saliencies, budgets, statistics_of_layer=found, **options)


def random_gram(size, seed):
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T


# --- statistics


@pytest.fixture(scope="module")
def observed(original, tokens):
    """(layer, its statistics, what it was given) of tiny models with 8 experts top-2 and 16 experts top-4."""
    found = {}
    for name, changes in (("mixtral", {}), ("qwen3_moe", {"num_experts": 16, "num_experts_per_tok": 4})):
        model = original(name, **changes)
        layers = find_layers(model)
        data = load_calibration(tokens, None, held_out_fraction=0, batch_size=5)
        needs = frozenset({"chosen_gram"})
        collected = collect(model, layers, data, needs, calibration_tokens=10**6, progress=False)
        found[name] = [
            (layer, collected[layer.name].statistics, collected[layer.name].calibration) for layer in layers
        ]
    return found


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_statistics_say_what_leaving_any_set_of_experts_out_changes(name, observed):
    layer, found, inputs = observed[name][1]
    before = routed_output(layer, inputs)
    slots = layer.num_slots
    assert found["chosen_gram"].shape == (slots, slots)
    for left_out in ([0], [slots - 1], [1, 2, 5], list(range(slots))):
        changed = []
        for hidden, index, weights in inputs.experts_inputs:
            kept = torch.stack([index != expert for expert in left_out]).all(0)
            changed.append(layer.family.run_experts(layer, hidden, index, weights * kept).detach())
        energy = sum(rows.double().square().sum() for rows in before)
        expected = relative_error(before, changed) * energy
        got = found["chosen_gram"][left_out][:, left_out].sum()
        torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-4, atol=1e-8)


def test_padding_skipped_slots_and_chunks_do_not_count(original, monkeypatch):
    from hf_mcsmoe.observation import observed as module

    layer = find_layers(original("mixtral"))[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, layer.hidden_size, generator=generator)
    index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(11)])
    weights = torch.rand(11, 2, generator=generator)
    weights[3, 0] = 0
    mask = torch.ones(11, dtype=torch.bool)
    mask[[5, 9]] = False
    sums = []
    for rows, chunk in ((torch.arange(11), 2**24), (mask.nonzero().flatten(), 3 * 2 * layer.hidden_size)):
        monkeypatch.setattr(module, "MOST_OUTPUTS", chunk)
        accumulator = StatisticsAccumulator(8, frozenset({"chosen_gram"}))
        seen = module.ObservedTokens(8, hidden[rows], index[rows], weights[rows], mask[rows])
        accumulator.update(seen, layer)
        sums.append(accumulator.finish("layer").sums)
    for name, value in sums[0].items():
        torch.testing.assert_close(value, sums[1][name], rtol=1e-5, atol=1e-8)


# --- inverse sensitivity


def test_layers_lose_in_inverse_proportion():
    # Sensitivities 8, 4, 2 of 8 experts each: shares 1 : 2 : 4 of the 7 that go.
    energies = [[1.0] * 8, [0.25] * 8, [0.0625] * 8]
    assert inverse(energies, [6, 6, 5]) == [7, 6, 4]
    # Roots of energies are summed, not the energies: 3 + 4 + 0 = 7 and 1 * 7.
    assert inverse([[9.0, 16.0, 0.0, 0.0, 0, 0, 0, 0], [49.0] + [0] * 7], [4, 4]) == [4, 4]


@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_that_of_webster(seed):
    generator = torch.Generator().manual_seed(seed)
    energies = (torch.rand(4, 6, generator=generator) ** 4).tolist()
    sensitivity = [sum(value**0.5 for value in row) for row in energies]
    for total in range(4, 25):
        kept = inverse(energies, [total, 0, 0, 0])
        assert sum(kept) == total and all(1 <= m <= 6 for m in kept)
        lost = [6 - m for m in kept]
        # No expert could go from another layer at a smaller price.
        for a, b in itertools.permutations(range(4), 2):
            if lost[a] and kept[b] > 1:
                assert sensitivity[a] * (2 * lost[a] - 1) <= sensitivity[b] * (2 * lost[b] + 1)


def test_limits_ties_and_layers_without_sensitivity():
    equal = [[1.0] * 4] * 3
    assert inverse(equal, [3, 3, 2]) == [2, 3, 3]  # the lower layer loses first
    assert inverse([[1.0] * 4, [0.0] * 4, [1.0] * 4], [2, 2, 2], min_experts=2) == [2, 2, 2]
    assert inverse([[1.0] * 4, [0.0] * 4, [1.0] * 4], [3, 3, 3]) == [4, 1, 4]
    assert inverse([[1.0] * 4, [0.0] * 4], [3, 3], max_experts=3) == [3, 3]
    assert inverse(equal, [4, 4, 4]) == [4, 4, 4]


# --- error curves


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [{}, {"min_experts": 2, "max_experts": 3}])
def test_the_sum_of_errors_is_the_least_of_all_splits(seed, limit):
    grams = [random_gram(size, 10 * seed + size) for size in (4, 3, 5)]
    generator = torch.Generator().manual_seed(seed)
    saliencies = [torch.randint(3, (len(g),), generator=generator).double() for g in grams]  # with ties

    def error(gram, saliency, count):
        by_rank = sorted(range(len(gram)), key=lambda e: (-saliency[e], e))
        dropped = by_rank[count:]
        return sum(gram[i, j].item() for i in dropped for j in dropped) / gram.sum().item()

    least, most = limit.get("min_experts", 1), limit.get("max_experts", 9)
    for total in (6, 7, 8):
        splits = itertools.product(*(range(least, min(most, len(gram)) + 1) for gram in grams))
        costs = {
            split: sum(error(*of_layer) for of_layer in zip(grams, saliencies, split, strict=True))
            for split in splits
            if sum(split) == total
        }
        got = curve(grams, saliencies, [total, 0, 0], **limit)
        assert sum(got) == total
        assert costs[tuple(got)] == pytest.approx(min(costs.values()), rel=1e-9)


def test_a_curve_by_hand_and_a_silent_layer():
    gram = torch.tensor([[4.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)  # energy 4
    saliency = torch.tensor([1.0, 2.0])
    assert error_of_keeping(gram, saliency).tolist() == [1.0, 1.0, 0.0]
    assert error_of_keeping(gram, saliency.flip(0)).tolist() == [1.0, 0.5, 0.0]
    assert error_of_keeping(torch.zeros(2, 2), saliency).tolist() == [0.0, 0.0, 0.0]
    silent = torch.zeros(2, 2, dtype=torch.float64)
    assert curve([gram, silent], [saliency, saliency], [2, 1]) == [2, 1]
    assert curve([silent, gram], [saliency, saliency], [2, 1]) == [1, 2]
    assert curve([silent, silent], [saliency, saliency], [2, 1]) == [2, 1]


# --- whole models


@pytest.mark.parametrize("rule", ["inverse_sensitivity", "error_curve"])
@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_budgets_of_models_are_exact_and_measured(rule, keep, original, tokens):
    model = original("mixtral")
    recipe = Recipe(keep=keep, allocation=rule, **DROP)
    result = compress_moe(model, recipe, calibration=tokens, progress=False)
    kept = [report.num_experts_after for report in result.compression_report.layers]
    assert sum(kept) == round(24 * keep)
    data = load_calibration(tokens, None, batch_size=8)
    fresh = original("mixtral")
    layers = find_layers(fresh)
    found = collect(fresh, layers, data, recipe.statistics_needed(), progress=False)
    of_layer = [found[layer.name].statistics for layer in layers]
    saliencies = [one.usage_frequency for one in of_layer]
    budgets = [round(8 * keep)] * 3
    assert kept == ALLOCATION[rule](saliencies, budgets, statistics_of_layer=of_layer)


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_streaming_allots_the_same(keep, original, tokens, tmp_path):
    original("mixtral").save_pretrained(tmp_path / "model")
    recipe = Recipe(keep=keep, allocation="error_curve", **DROP)
    how = {"calibration": tokens, "progress": False}
    streamed = compress_moe(tmp_path / "model", recipe, executor="streaming", output_dir=tmp_path / "out", **how)
    loaded = compress_moe(original("mixtral"), recipe, **how)
    assert [r.group_of_expert for r in streamed.compression_report.layers] == [
        r.group_of_expert for r in loaded.compression_report.layers
    ]


@pytest.mark.parametrize("rule", ["inverse_sensitivity", "error_curve"])
def test_limits_that_cannot_be_kept_are_refused_before_anything_runs(rule, original):
    model = original("mixtral")
    recipe = Recipe(keep=0.25, allocation=rule, allocation_options={"min_experts": 3}, **DROP)
    with pytest.raises(ValueError, match=r"budget of 6 experts over 3 layers.*min_experts=3.*Change keep"):
        check_layout(find_layers(model), recipe, model=model)
