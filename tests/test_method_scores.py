"""Pruning by a score of each expert, against the papers' formulas, token by token."""

import copy

import pytest
import torch
from all_families import tiny
from slow_moe import MODELS, STUDIED, kept_by, padded, ragged_rows, slow_layers

from hf_mcsmoe import MergedSparseMoeConfig, compress_moe
from hf_mcsmoe.executors.in_memory import collect_statistics
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.observation.observed import ObservedTokens
from hf_mcsmoe.presets import PRESETS
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.saliency import SALIENCY
from hf_mcsmoe.statistics import STATISTICS
from hf_mcsmoe.statistics.residual_changes import cosine
from hf_mcsmoe.types import LayerStatistics


def mean(values):
    return sum(values) / len(values) if values else 0.0


def reap(layer, e):
    return mean([g * layer.output_for(e, token).norm().item() for g, token in layer.routed_to(e)])


def ean(layer, e):
    return sum(layer.output_for(e, token).norm().item() for _, token in layer.routed_to(e))


def man(layer, e):
    return mean([layer.output_for(e, token).norm().item() for _, token in layer.routed_to(e)])


def msan(layer, e):
    return mean([layer.output_for(e, token).square().sum().item() for _, token in layer.routed_to(e)])


def easy_ep(layer, e):
    total = 0.0
    for g, token in layer.routed_to(e):
        after = token.residual + sum(w * layer.output_for(i, token) for i, w in token.gates.items())
        cosine = (token.residual @ after / (token.residual.norm() * after.norm())).item()
        total += g * layer.output_for(e, token).norm().item() * max(1 - cosine, 0)
    return total


FORMULAS = {"reap": reap, "ean": ean, "man": man, "msan": msan, "easy-ep": easy_ep}


@pytest.fixture(scope="module", params=STUDIED)
def studied(request, original, tokens):
    """(model, rows, the same layers by the slow reference)."""
    model = original(request.param, **MODELS[request.param])
    rows = ragged_rows(tokens)
    return model, rows, slow_layers(model, rows)


@pytest.mark.parametrize("preset", FORMULAS)
def test_a_score_is_what_the_formula_says(studied, preset):
    model, rows, slow = studied
    recipe = recipe_from_preset(preset)
    found, _ = collect_statistics(model, find_layers(model), padded(rows), SALIENCY.needs(recipe.saliency))
    for layer, statistics in zip(slow, found.values(), strict=True):
        expected = torch.tensor([FORMULAS[preset](layer, e) for e in range(layer.num_experts)], dtype=torch.float64)
        score = SALIENCY[recipe.saliency](statistics, None)
        assert score.dtype == torch.float64
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("preset", FORMULAS)
def test_a_preset_keeps_the_experts_of_the_largest_scores(studied, preset, layout):
    model, rows, slow = studied
    result = compress_moe(
        copy.deepcopy(model),
        MergedSparseMoeConfig.from_preset(preset, layout=layout),
        calibration=padded(rows),
        progress=False,
    )
    for layer, report in zip(slow, result.compression_report.layers, strict=True):
        score = [FORMULAS[preset](layer, e) for e in range(layer.num_experts)]
        assert report.dominant_of_group == kept_by(score, layer.num_experts // 2)
        assert sum(group < 0 for group in report.group_of_expert) == layer.num_experts // 2


@pytest.mark.parametrize("preset", [*FORMULAS, "random"])
def test_the_published_layout_is_the_native_one(preset):
    assert PRESETS[preset].recipe["layout"] == "native"


def test_scores_differ_where_the_papers_differ(studied):
    *_, slow = studied
    orders = {name: kept_by([f(slow[0], e) for e in range(slow[0].num_experts)], 4) for name, f in FORMULAS.items()}
    assert len(set(map(tuple, orders.values()))) >= 3, "the inputs tell the formulas apart"


def test_scores_worked_out_by_hand():
    statistics = collect_by_hand()
    assert SALIENCY["total_output_norm"](statistics, None).tolist() == [15.0, 0.0]
    assert SALIENCY["output_norm"](statistics, None).tolist() == [7.5, 0.0]
    assert SALIENCY["squared_output_norm"](statistics, None).tolist() == [62.5, 0.0]


def collect_by_hand():
    """One expert that gives (3, 4) and (6, 8), norms 5 and 10, and one that is not used."""

    class Routed:
        outputs = torch.tensor([[3.0, 4.0], [6.0, 8.0]])

    names = ("output_norm_sum", "squared_output_norm_sum")
    sums = {
        name: torch.stack([STATISTICS[name](Routed).double(), torch.zeros((), dtype=torch.float64)]) for name in names
    }
    return LayerStatistics(2, torch.tensor([2, 0]), sums)


@pytest.mark.parametrize(
    "name, shape", [("squared_output_norm_sum", (16,)), ("residual_change_sum", (16,)), ("output_max", (16,))]
)
def test_memory_of_a_statistic(original, tokens, name, shape):
    model = original("qwen3_moe", **MODELS["qwen3_moe"])
    found, _ = collect_statistics(model, find_layers(model), padded(ragged_rows(tokens)), frozenset({name}))
    assert all(one[name].shape == shape and one[name].dtype == torch.float64 for one in found.values())


def test_random_orders_are_repeatable_and_differ_by_seed_and_layer(compress):
    def kept(**options):
        result = compress("mixtral", preset="random", saliency_options=options)
        return [report.dominant_of_group for report in result.compression_report.layers]

    assert kept(seed=3) == kept(seed=3) != kept(seed=4)
    assert len(set(map(tuple, kept(seed=3)))) > 1, "layers draw different experts"


def test_a_decoder_layer_without_a_readable_residual_is_refused_before_the_model_runs(original, tokens):
    model = original("gemma4_text")
    model.forward = None
    with pytest.raises(
        ValueError, match=r"residual stream around 'model.layers.0'.*whole decoder layer.*gated_output"
    ):
        compress_moe(model, "easy-ep", calibration=tokens, progress=False)


def test_experts_that_cannot_be_run_one_by_one_are_refused_before_the_model_runs(tokens):
    model = copy.deepcopy(tiny("dbrx"))
    model.forward = None
    with pytest.raises(
        ValueError, match=r"collects gated_output_norm_sum, .* cannot be run one by one: DBRX.*frequency"
    ):
        compress_moe(model, "reap", calibration=tokens, progress=False)


def test_several_residual_streams_are_refused(tokens):
    with pytest.raises(ValueError, match=r"residual stream around 'model.layers.0.mlp', which cannot be read"):
        recipe = MergedSparseMoeConfig.from_preset("easy-ep", layout="mapped")
        compress_moe(copy.deepcopy(tiny("deepseek_v4")), recipe, calibration=tokens % 130, progress=False)


def test_an_output_that_is_scaled_before_it_is_added_is_refused(original, tokens):
    model = original("granitemoe", residual_multiplier=0.5)
    with pytest.raises(ValueError, match=r"changed before it is added to the residual.*exclude_layers"):
        compress_moe(model, "easy-ep", calibration=tokens, progress=False)


def test_a_token_without_a_residual_has_no_direction():
    left = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    right = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0], [-4.0, 0.0]])
    assert cosine(left, right).tolist() == [0.0, 0.0, 0.0, -1.0]


def test_padding_that_is_not_finite_does_not_count():
    class NoExperts:
        def where_routed(self, observed):  # noqa: ARG002
            return iter(())

    residual = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    mask, index = torch.tensor([True, False]), torch.zeros(2, 1, dtype=torch.int64)
    observed = ObservedTokens(3, residual, index, torch.ones(2, 1), mask, residual=residual)
    assert STATISTICS["residual_change_sum"](NoExperts(), observed).tolist() == [0.0, 0.0, 0.0]
