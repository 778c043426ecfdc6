"""Pruning of single neurons by statistics alone: CAMERA-P and HEAPr against loops over tokens."""

import copy

import pytest
import torch
from slow_moe import MODELS, STUDIED, padded, ragged_rows, slow_layers
from torch.testing import assert_close

from hf_mcsmoe import MergedSparseMoeConfig, Recipe, compress_moe
from hf_mcsmoe.executors.in_memory import collect_statistics
from hf_mcsmoe.expert_values import PackedExperts
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.observation.layer_tokens import as_float32
from hf_mcsmoe.selection import SELECTION

ROWS = slice(0, 8)


def camera(layer, e, alpha):
    """The score of each neuron of an expert, one token after the other."""
    total = torch.zeros(layer.down.shape[2], dtype=torch.float64)
    peak = total.clone()
    for g, token in layer.routed_to(e):
        phi = g * layer.activation(e, token.hidden)
        total += phi**2
        peak = torch.maximum(peak, phi**2)
    return ((1 - alpha) * total + alpha * peak) * layer.down[e].square().sum(0)


@pytest.fixture(scope="module", params=STUDIED)
def studied(request, original, tokens):
    """(model, rows, the same layers by the slow reference)."""
    model = original(request.param, **MODELS[request.param])
    rows = ragged_rows(tokens)[ROWS]
    return model, rows, slow_layers(model, rows)


def pruned(model, data, preset, **changes):
    recipe = MergedSparseMoeConfig.from_preset(preset, **changes)
    return compress_moe(copy.deepcopy(model), recipe, calibration=data, progress=False)


def packed(layer):
    return as_float32(layer.family.view(layer, {name: p.detach() for name, p in layer.expert_parameters.items()}))


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_camera_scores_are_what_the_formula_says(studied, alpha):
    model, rows, slow = studied
    needs = SELECTION.needs("micro_expert_energy")
    found, _ = collect_statistics(model, find_layers(model), padded(rows), needs)
    for layer, mine, statistics in zip(slow, find_layers(model), found.values(), strict=True):
        expected = torch.cat([camera(layer, e, alpha) for e in range(layer.num_experts)])
        kept = torch.arange(layer.num_experts)
        supply = {"statistics": lambda statistics=statistics: statistics, "experts_kept": lambda kept=kept: kept}
        got = SELECTION.call("micro_expert_energy", packed(mine), options={"alpha": alpha}, supply=supply)
        assert_close(got, expected, rtol=1e-4, atol=1e-9)
        assert all(s.shape == (layer.num_experts, layer.down.shape[2]) for s in statistics.sums.values())


def test_all_experts_become_equally_narrow_and_keep_their_best_neurons(studied):
    model, rows, slow = studied
    result = pruned(model, padded(rows), "camera-p", sequential=False)
    assert type(result) is type(model)
    width = {40: 24, 24: 16}[slow[0].down.shape[2]]  # half of them, to a multiple of 8
    for layer, small in zip(slow, find_layers(result), strict=True):
        for e in range(layer.num_experts):
            best = camera(layer, e, 0.9).argsort(descending=True)[:width].sort().values
            assert torch.equal(small.experts.down_proj[e], layer.down[e][:, best].float())


def test_in_the_mapped_layout_the_neurons_of_a_layer_compete(studied):
    model, rows, slow = studied
    result = pruned(model, padded(rows), "camera-p", sequential=False, layout="mapped")
    for layer, report in zip(slow, result.compression_report.layers, strict=True):
        width = layer.down.shape[2]
        budget = layer.num_experts * width // 2
        assert sum(report.widths) == budget and len(set(report.widths)) > 1
        least = width // 2 // 8  # whatever calibration says
        scores = [camera(layer, e, 0.9).sort(descending=True).values for e in range(layer.num_experts)]
        rest = torch.cat([one[least:] for one in scores]).sort(descending=True).values
        last = rest[budget - least * layer.num_experts - 1]
        assert report.widths == [least + int((one[least:] >= last).sum()) for one in scores]


def test_the_published_rule_sees_the_pruned_prefix(studied):
    model, rows, _ = studied
    apart = pruned(model, padded(rows), "camera-p", sequential=False)
    in_turn = pruned(model, padded(rows), "camera-p")
    first, *rest = zip(find_layers(apart), find_layers(in_turn), strict=True)
    assert torch.equal(first[0].experts.down_proj, first[1].experts.down_proj)
    assert any(not torch.equal(a.experts.down_proj, b.experts.down_proj) for a, b in rest)


def test_no_token_is_kept_for_a_rule_that_reads_statistics_only():
    assert not Recipe(selection="micro_expert_energy", allocation="uniform").needs_inputs
    assert Recipe(selection="gated_energy", allocation="uniform").needs_inputs
    assert Recipe(selection="micro_expert_energy", refit="least_squares").needs_inputs


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "olmoe"])
def test_other_families_with_fewer_experts_too(original, tokens, prompt, model_type, layout):
    keep_experts = 0.75 if layout == "mapped" else 1.0
    result = pruned(
        original(model_type), tokens, "camera-p", sequential=False, layout=layout, keep=0.5, keep_experts=keep_experts
    )
    with torch.no_grad():
        assert torch.isfinite(result(input_ids=prompt).logits).all()


def test_a_neuron_that_never_answers_goes_first():
    experts = PackedExperts(
        offsets=torch.tensor([0, 3]),
        up=torch.ones(3, 2),
        gate=torch.ones(3, 2),
        down=torch.tensor([[3.0, 4], [1, 0], [9, 9]]),
    )

    class Statistics(dict):
        pass

    sums = Statistics(
        gated_activation_energy=torch.tensor([[2.0, 8.0, 0.0]]), gated_activation_peak=torch.tensor([[1.0, 4.0, 0.0]])
    )
    supply = {"statistics": lambda: sums, "experts_kept": lambda: torch.tensor([0])}
    got = SELECTION.call("micro_expert_energy", experts, options={"alpha": 0.5}, supply=supply)
    assert got.tolist() == [1.5 * 25, 6.0, 0.0]


@pytest.mark.parametrize("alpha", [-0.1, 1.5, True])
def test_alpha_is_checked_when_the_recipe_is_made(alpha):
    with pytest.raises(ValueError, match=rf"alpha of selection 'micro_expert_energy' is {alpha}, it must be in"):
        MergedSparseMoeConfig.from_preset("camera-p", selection_options={"alpha": alpha})
