"""NAEE: the subset of experts that is kept has the least error of the layer's output, by a search from the text."""

import copy
import itertools

import pytest
import torch
from accelerate import cpu_offload
from slow_moe import MODELS, STUDIED, padded, ragged_rows, slow_layers
from torch.testing import assert_close

from hf_mcsmoe import MergedSparseMoeConfig, Recipe, compress_moe
from hf_mcsmoe.executors.in_memory import collect
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.grouping import subset_search
from hf_mcsmoe.observation.native_gates import native_gates

ROWS = slice(0, 3)


def native_output(layer, token, kept, top_k):
    """The experts `kept` under the gates of a router with softmax over what is left and weights that sum to 1."""
    scores = sorted(((token.logits[e].item(), -e) for e in kept), reverse=True)[:top_k]
    exponentials = {-e: torch.tensor(z).exp().item() for z, e in scores}
    total = sum(exponentials.values())
    return sum(w / total * layer.output_for(e, token) for e, w in exponentials.items())


def mapped_output(layer, token, kept, top_k):  # noqa: ARG001
    zero = torch.zeros_like(token.hidden)
    return sum((g * layer.output_for(e, token) for e, g in token.gates.items() if e in kept), zero)


OUTPUTS = {"native": native_output, "mapped": mapped_output}


def error(layer, kept, output, top_k):
    total = 0.0
    for token in layer.tokens:
        full = sum(g * layer.output_for(e, token) for e, g in token.gates.items())
        total += (full - output(layer, token, kept, top_k)).square().sum().item()
    return total


@pytest.fixture(scope="module", params=STUDIED)
def studied(request, original, tokens):
    """(model type, model, rows, the same layers by the slow reference)."""
    model = original(request.param, **MODELS[request.param])
    rows = ragged_rows(tokens)[ROWS]
    return request.param, model, rows, slow_layers(model, rows)


def naee(model, data, **changes):
    recipe = MergedSparseMoeConfig.from_preset("naee", **changes)
    return compress_moe(copy.deepcopy(model), recipe, calibration=data, progress=False)


def test_the_exact_search_finds_the_best_of_all_subsets(original, tokens, layout):
    model, rows = original("mixtral", num_hidden_layers=2), ragged_rows(tokens)[ROWS]
    result = naee(model, padded(rows), layout=layout)
    for layer, report in zip(slow_layers(model, rows), result.compression_report.layers, strict=True):
        # mixtral normalises over the two it chose, which is the softmax over these
        errors = {k: error(layer, k, OUTPUTS[layout], 2) for k in itertools.combinations(range(8), 4)}
        assert tuple(report.dominant_of_group) == min(errors, key=errors.get)
        assert sum(group < 0 for group in report.group_of_expert) == 4


def test_the_elimination_takes_the_cheapest_expert_in_each_step(studied, layout):
    _, model, rows, slow = studied
    top_k = model.config.num_experts_per_tok
    num_experts = slow[0].num_experts - 2
    result = naee(
        model, padded(rows), layout=layout, num_experts=num_experts, keep=None, grouping_options={"max_subsets": 0}
    )
    layer, report = slow[1], result.compression_report.layers[1]
    kept = list(range(layer.num_experts))
    for _ in range(2):
        costs = {e: error(layer, [k for k in kept if k != e], OUTPUTS[layout], top_k) for e in kept}
        kept.remove(min(kept, key=lambda e: (costs[e], -e)))
    assert report.dominant_of_group == kept


def test_gates_without_some_rows_are_those_of_the_cut_router(studied):
    _, model, rows, slow = studied
    layer = find_layers(model)[0]
    before = {name: p.clone() for name, p in layer.router.named_parameters()}
    inputs = collect(model, [layer], padded(rows), frozenset(), calibration_tokens=10_000)[layer.name].calibration
    kept = [1, 2, 4, 5, 7]
    gates = torch.cat(native_gates(layer, inputs, torch.tensor(kept)))
    assert gates.shape == (sum(map(len, rows)), layer.num_slots)
    top_k = model.config.num_experts_per_tok
    by_hidden = {tuple(token.hidden.float().tolist()): token for token in slow[0].tokens}
    for hidden, row in zip(torch.cat([h for h, _, _ in inputs.experts_inputs]), gates, strict=True):
        token = by_hidden[tuple(hidden.tolist())]
        chosen = sorted(kept, key=lambda e: -token.logits[e])[:top_k]
        weights = torch.softmax(token.logits[chosen], 0)
        expected = torch.zeros(layer.num_slots, dtype=torch.float64)
        expected[chosen] = weights
        assert_close(row.double(), expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in layer.router.named_parameters())
    assert layer.router.weight.shape[0] == layer.num_slots


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "gpt_oss", "nemotron_h", "granitemoe", "qwen2_moe"])
def test_gates_of_the_search_are_those_that_the_native_result_applies(original, tokens, model_type):
    model = original(model_type)
    layer = find_layers(model)[0]
    data = padded(ragged_rows(tokens)[ROWS])
    inputs = collect(model, [layer], data, frozenset(), calibration_tokens=10_000)[layer.name].calibration
    kept = [0, 1, 3, 4, 6, 7]
    expected = native_gates(layer, inputs, torch.tensor(kept))
    cut = compress_moe(
        original(model_type),
        Recipe(layout="native", num_experts=6, grouping="drop", similarity=None, merging=None, alignment=None),
        calibration=data,
        progress=False,
    )
    small = find_layers(cut)[0]
    rows = torch.tensor(cut.compression_report.layers[0].dominant_of_group)
    expected = native_gates(layer, inputs, rows)
    for place, gates in enumerate(expected):
        index, weights = small.family.route(small, *inputs.router_call(place, small.block))
        found = torch.zeros_like(gates).scatter_add_(1, rows[index], weights.float())
        assert_close(found, gates)


def test_only_the_least_salient_are_tried_with_candidates():
    saliency = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    tried = []

    def errors(kept):
        tried.append(kept)
        return float(sum(kept))

    kept = subset_search.eliminate(errors, saliency, [5], 3, torch.zeros(5, dtype=torch.bool), 2)
    # 1 and 3 are least salient: without 3 less is left; then 1 and 4.
    assert tried == [(0, 2, 3, 4), (0, 1, 2, 4), (0, 2, 4), (0, 1, 2)]
    assert kept == (0, 1, 2)


def test_subsets_keep_partitions_even_and_protected_experts_in():
    none = torch.zeros(4, dtype=torch.bool)
    assert list(subset_search.subsets_of([2, 2], 1, none)) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert list(subset_search.subsets_of([4], 2, torch.tensor([False, True, False, False]))) == [
        (0, 1),
        (1, 2),
        (1, 3),
    ]
    even = subset_search.eliminate(lambda kept: -sum(kept), torch.zeros(4), [2, 2], 1, none, None)
    assert even == (1, 3), "one of each run, however cheap two of one run are"


def test_the_memory_is_that_of_the_inner_products(original, tokens, monkeypatch):
    kept = []
    monkeypatch.setattr(subset_search, "eliminate", lambda errors, *_: kept.append(errors) or tuple(range(4)))
    model = original("mixtral")
    naee(model, tokens, grouping_options={"max_subsets": 0}, layout="mapped", exclude_layers=(1, 2))
    numbers = sum(gram.numel() for gram in kept[0].grams)
    assert numbers == 8**2 * sum(len(batch.hidden_states) for batch in kept[0].tokens.calibration)


def test_batches_are_spread_evenly_within_the_bound():
    assert subset_search.spread([10] * 6, 60) == [0, 1, 2, 3, 4, 5]
    assert subset_search.spread([10] * 6, 59) == [0, 2, 4]
    assert subset_search.spread([10] * 6, 25) == [0, 3]
    assert subset_search.spread([10] * 6, 3) == [0]
    assert subset_search.spread([], 3) == []


def test_a_progressive_search_sees_the_compressed_prefix(original, tokens):
    model = original("mixtral")
    apart, progressive = (naee(model, tokens, num_experts=2, sequential=x) for x in (False, True))
    first, second = ([r.dominant_of_group for r in m.compression_report.layers] for m in (apart, progressive))
    assert first[0] == second[0] and first != second


@pytest.mark.parametrize("protect", [None, "super_experts"])
def test_group_limited_routers_and_protected_experts(original, tokens, protect):
    result = naee(original("deepseek_v3"), tokens, layout="mapped" if protect else "native", protect=protect)
    for layer in result.compression_report.layers:
        assert len(layer.dominant_of_group) == 4
        assert set(layer.protected_experts) <= set(layer.dominant_of_group)
        if protect is None:
            assert sum(e < 4 for e in layer.dominant_of_group) == 2


@pytest.mark.filterwarnings("ignore:.*offloaded modules.*:UserWarning")
def test_offloaded_routers_and_experts_give_the_same_subsets(original, tokens):
    expected, model = naee(original("deepseek_v3"), tokens, num_experts=6), original("deepseek_v3")
    cpu_offload(model, execution_device=torch.device("cpu"))
    recipe = MergedSparseMoeConfig.from_preset("naee", num_experts=6)
    result = compress_moe(model, recipe, calibration=tokens, progress=False)
    kept, same = ([r.dominant_of_group for r in m.compression_report.layers] for m in (expected, result))
    assert kept == same


@pytest.mark.parametrize("option, value", [("max_subsets", -1), ("candidates", 0), ("max_subsets", True)])
def test_bounds_of_options_are_checked_when_the_recipe_is_made(option, value):
    with pytest.raises(ValueError, match=rf"{option} of grouping 'subset_search' is {value}, it must be a whole"):
        MergedSparseMoeConfig.from_preset("naee", grouping_options={option: value})
