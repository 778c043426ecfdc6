"""Super experts are found as the paper says and left alone by every recipe."""

import pytest
import torch
from slow_moe import MODELS, STUDIED, padded, ragged_rows, slow_layers

from hf_mcsmoe import MergedSparseMoeConfig, Recipe, compress_moe
from hf_mcsmoe.executors.in_memory import collect_statistics
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.grouping import GROUPING
from hf_mcsmoe.layer.protection import group_around, protected_experts, statistics_of
from hf_mcsmoe.presets import PRESETS
from hf_mcsmoe.protection.super_experts import find_super_experts
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.types import LayerStatistics

SUPER = 2


def statistics_with(maxima):
    return [LayerStatistics(1, torch.ones(len(a), dtype=torch.int64), {"output_max": torch.tensor(a)}) for a in maxima]


def found_in(maxima, **options):
    masks = find_super_experts(statistics_with(maxima), **options)
    return [(layer, e) for layer, mask in enumerate(masks) for e in mask.nonzero().flatten().tolist()]


@pytest.fixture
def planted(original):
    """A model whose first layer has a super expert: one that is rarely used, with a large negative output."""

    def make(model_type="mixtral", **changes):
        model = original(model_type, **{**MODELS.get(model_type, {}), **changes})
        layer = find_layers(model)[0]
        with torch.no_grad():
            layer.family.view(layer, layer.expert_parameters).down[SUPER].mul_(-300)
        return model

    return make


def compress_protected(model, tokens, preset="m-smoe", **changes):
    recipe = MergedSparseMoeConfig.from_preset(preset, protect="super_experts", **changes)
    return compress_moe(model, recipe, calibration=tokens, progress=False)


def test_an_expert_must_pass_both_thresholds():
    # 200 experts: the 99.5th percentile lies between the two largest, at 199 * 0.995 = 198.005 of the sorted ones.
    small = [float(i % 7) for i in range(99)]
    assert found_in([[*small, 50.0], [1.0] * 100, [], []]) == [(0, 99)]
    # 1000 experts: five are above the percentile, but three of them are no tenth of the largest.
    many = [0.0] * 995 + [9.9, 10.0, 10.1, 60.0, 100.0]
    assert found_in([many]) == [(0, 997), (0, 998), (0, 999)], "10.0 is not more than a tenth of 100"
    assert found_in([many], percentile=99.9) == [(0, 999)]
    assert found_in([many], ratio=0.5) == [(0, 998), (0, 999)]


def test_only_the_first_three_quarters_of_the_layers_count():
    maxima = [[1.0] * 300 for _ in range(8)]
    for layer in range(8):
        maxima[layer][layer] = 100.0
    assert found_in(maxima) == [(layer, layer) for layer in range(6)]
    assert found_in(maxima, first_layers=1.0) == [(layer, layer) for layer in range(8)]


@pytest.mark.parametrize("model_type", STUDIED)
def test_the_largest_output_is_that_of_a_loop_over_tokens(planted, tokens, model_type):
    model, rows = planted(model_type), ragged_rows(tokens)
    found, _ = collect_statistics(model, find_layers(model), padded(rows), frozenset({"output_max"}))
    for layer, statistics in zip(slow_layers(model, rows), found.values(), strict=True):
        for e in range(layer.num_experts):
            expected = max((layer.output_for(e, t).abs().max().item() for _, t in layer.routed_to(e)), default=0.0)
            assert statistics["output_max"][e].item() == pytest.approx(expected, rel=1e-4)
    masks = protected_experts(Recipe(protect="super_experts"), found)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()} == {
        find_layers(model)[0].name: [SUPER]
    }


@pytest.mark.parametrize("preset", ["m-smoe", "frequency", "reap", "random"])
def test_a_super_expert_is_never_dropped_or_merged(planted, tokens, preset, layout):
    model = planted()
    before = find_layers(model)[0].experts.down_proj[SUPER].clone()
    free = compress_moe(planted(), MergedSparseMoeConfig.from_preset(preset, layout=layout), calibration=tokens)
    result = compress_protected(model, tokens, preset, layout=layout)
    first, *others = result.compression_report.layers
    assert first.protected_experts == [SUPER] and all(layer.protected_experts == [] for layer in others)
    group = first.group_of_expert[SUPER]
    assert first.dominant_of_group[group] == SUPER
    assert first.group_of_expert.count(group) == 1
    assert torch.equal(find_layers(result)[0].experts.down_proj[group], before)
    assert sum(x.num_experts_after for x in result.compression_report.layers) == sum(
        x.num_experts_after for x in free.compression_report.layers
    )


def test_frequency_alone_would_have_dropped_it(planted, tokens):
    result = compress_moe(planted(), "frequency", calibration=tokens, progress=False)
    assert result.compression_report.layers[0].group_of_expert[SUPER] == -1


def test_grouping_goes_on_among_the_others_as_if_the_protected_ones_were_not_there():
    similarity = torch.tensor([[0, 9, 1, 2, 3], [9, 0, 8, 1, 1], [1, 8, 0, 5, 4], [2, 1, 5, 0, 6], [3, 1, 4, 6, 0.0]])
    saliency = torch.tensor([0.5, 0.1, 0.3, 0.2, 0.05], dtype=torch.float64)
    protected = torch.tensor([False, True, False, False, False])

    def group(saliency, similarity, number, supply):
        return GROUPING.call("dominant_experts", saliency, similarity, number, 1, options={}, supply=supply)

    groups = group_around(protected, group, saliency, similarity, 3, {})
    # Without expert 1, experts 0 and 2 lead; 3 and 4 are most like 2.
    assert groups.dominant_of_group.tolist() == [0, 1, 2]
    assert groups.group_of_expert.tolist() == [0, 1, 2, 2, 2]
    alone = group_around(~protected, group, saliency, similarity, 5, {})
    assert alone.group_of_expert.tolist() == [0, 1, 2, 3, 4]


def test_statistics_of_some_experts_are_their_rows_and_columns():
    sums = {"gate_sum": torch.arange(4.0), "logit_gram": torch.arange(16.0).view(4, 4)}
    part = statistics_of(LayerStatistics(9, torch.tensor([4, 3, 2, 1]), sums), torch.tensor([1, 3]))
    assert part.num_tokens == 9 and part.selection_count.tolist() == [3, 1]
    assert part["gate_sum"].tolist() == [1, 3] and part["logit_gram"].tolist() == [[5, 7], [13, 15]]


def test_keeping_everything_stays_bit_identical(planted, tokens, prompt, layout):
    with torch.no_grad():
        expected = planted()(input_ids=prompt).logits
        result = compress_protected(planted(), tokens, keep=1.0, layout=layout)
        assert torch.equal(result(input_ids=prompt).logits, expected)


def test_the_one_expert_that_stays_may_be_the_protected_one_only_where_others_can_be_dropped(planted, tokens):
    result = compress_protected(planted(), tokens, "frequency", num_experts=1, allocation="uniform")
    assert result.compression_report.layers[0].dominant_of_group == [SUPER]
    with pytest.raises(ValueError, match=r"num_experts is 1 .*found 1 experts there, so at least 2 must stay.*keep"):
        compress_protected(planted(), tokens, num_experts=1, allocation="uniform")


def test_routers_that_choose_within_groups_are_refused_in_the_native_layout(planted, tokens):
    with pytest.raises(ValueError, match=r"protect is 'super_experts', but .*2 groups of the router.*layout='mapped'"):
        compress_protected(planted("deepseek_v3"), tokens, layout="native")
    result = compress_protected(planted("deepseek_v3"), tokens)
    assert result.compression_report.layers[0].protected_experts == [SUPER]


@pytest.mark.parametrize("changes", [{"allocation": "uniform"}, {"allocation": "global_usage"}])
def test_streaming_protects_the_same_experts(planted, tokens, tmp_path, changes):
    planted().save_pretrained(tmp_path / "model")
    recipe = Recipe(protect="super_experts", **changes)
    where = {"output_dir": tmp_path / "out", "executor": "streaming", "progress": False}
    streamed = compress_moe(tmp_path / "model", recipe, calibration=tokens, **where)
    assert streamed.streaming_summary.passes == 2
    loaded = compress_moe(planted(), recipe, calibration=tokens, progress=False)
    for one, other in zip(streamed.compression_report.layers, loaded.compression_report.layers, strict=True):
        assert one.protected_experts == other.protected_experts
        assert one.group_of_expert == other.group_of_expert


@pytest.mark.parametrize("option, value", [("percentile", 101), ("ratio", -0.1), ("first_layers", True)])
def test_bounds_of_options_are_checked_when_the_recipe_is_made(option, value):
    with pytest.raises(ValueError, match=rf"{option} of protection 'super_experts' is {value}, it must be in"):
        Recipe(protect="super_experts", protect_options={option: value})


def test_no_preset_protects_by_itself():
    assert all(recipe_from_preset(preset).protect is None for preset in PRESETS)
