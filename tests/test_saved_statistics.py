"""Calibrate once, compress many: the same result as from the data, and nothing wrong is accepted."""

import json

import pytest
import torch
from test_contract import logits

from hf_mcsmoe import calibrate_moe, compress_moe
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.saved_statistics import SavedStatistics

SHARED = ("m-smoe", "reap", "narrow-obs", "joint-obs")


@pytest.fixture
def saved(original, tokens, tmp_path):
    """`saved(model_type, presets)`: statistics of that tiny model."""

    def run(model_type="qwen3_moe", presets=SHARED, **changes):
        recipes = [recipe_from_preset(preset, **changes) for preset in presets]
        return calibrate_moe(original(model_type), recipes, tmp_path / "stats", calibration=tokens, progress=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_one_run_serves_several_methods_at_any_ratio(model_type, saved, original, compress, prompt, tmp_path):
    presets = [p for p in SHARED if p != "narrow-obs" or model_type == "qwen3_moe"]  # native widths need a plain field
    saved(model_type, presets)
    for preset, keep in zip(presets, (0.5, 0.75, 0.25, 0.75), strict=False):
        recipe = recipe_from_preset(preset, keep=keep, collapse_duplicates=True)
        result = compress_moe(original(model_type), recipe, calibration=tmp_path / "stats", progress=False)
        direct = compress(model_type, preset=preset, keep=keep, collapse_duplicates=True)
        assert torch.equal(logits(result, prompt), logits(direct, prompt)), preset
        report, expected = result.compression_report, direct.compression_report
        assert report.calibration == expected.calibration
        assert [x.usage_frequency for x in report.layers] == [x.usage_frequency for x in expected.layers]


def test_layers_are_left_out_by_the_recipe_not_by_the_statistics(saved, original, compress, prompt, tmp_path):
    saved(presets=["m-smoe"])
    changes = {"preset": "m-smoe", "exclude_layers": [0]}
    result = compress_moe(
        original("qwen3_moe"), recipe_from_preset(**changes), calibration=str(tmp_path / "stats"), progress=False
    )
    assert torch.equal(logits(result, prompt), logits(compress("qwen3_moe", **changes), prompt))


def test_a_recipe_that_needs_more_is_refused_with_what_is_missing(saved, original, tmp_path):
    saved(presets=["frequency"])
    for preset, missing in (("m-smoe", "logit_gram"), ("reap", "gated_output_norm_sum"), ("joint-obs", "kept tokens")):
        with pytest.raises(ValueError, match=rf"lack \['{missing}'\], which {preset} needs. Calibrate again"):
            compress_moe(original("qwen3_moe"), preset, calibration=tmp_path / "stats", progress=False)


def test_tokens_must_have_been_drawn_the_same_way(saved, original, tmp_path):
    saved(presets=["narrow-obs"])
    for name, value in (("fit_tokens", 100), ("seed", 3)):
        recipe = recipe_from_preset("narrow-obs", **{name: value})
        with pytest.raises(ValueError, match=rf"made with {name} \d+, the recipe has {value}"):
            compress_moe(original("qwen3_moe"), recipe, calibration=tmp_path / "stats", progress=False)
    with pytest.raises(ValueError, match=r"the recipe is sequential. Set sequential=False"):
        compress_moe(
            original("qwen3_moe"), recipe_from_preset("narrow-obs", sequential=True), calibration=tmp_path / "stats"
        )
    with pytest.raises(ValueError, match="'auto' compares recipes on held-out text"):
        compress_moe(original("qwen3_moe"), "auto", calibration=tmp_path / "stats")


@pytest.mark.parametrize("change", ["router", "one weight of one expert", "configuration"])
def test_another_model_is_refused_and_left_as_it_is(change, saved, original, tmp_path):
    saved(presets=["m-smoe"])
    model = original("qwen3_moe")
    layer = find_layers(model)[1]
    with torch.no_grad():
        if change == "router":
            next(layer.router.parameters())[0, 0] += 1e-3
        elif change == "configuration":
            model.config.rms_norm_eps = 1e-3
        else:
            next(iter(layer.expert_parameters.values()))[5, 0, 0] += 1.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"are of another model: (config\.rms_norm_eps|layers\.).*Calibrate this one"):
        compress_moe(model, "m-smoe", calibration=tmp_path / "stats", progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_safe_files_are_written_and_the_header_is_the_last(saved, tmp_path):
    statistics = saved(presets=["reap"])
    folder = tmp_path / "stats"
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    assert statistics.header["wanted"]["statistics"] == ["gated_output_norm_sum", "selection_count"]
    values = json.loads((folder / "statistics.json").read_text())
    (folder / "statistics.json").write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(ValueError, match=r"format_version 99, this hf_mcsmoe reads up to 1. Upgrade"):
        SavedStatistics(folder)
    (folder / "statistics.json").unlink()
    with pytest.raises(FileNotFoundError, match="Make it with `hf-mcsmoe calibrate`"):
        SavedStatistics(folder)


def test_recipes_that_draw_differently_cannot_share_a_run(original, tokens, tmp_path):
    recipes = [recipe_from_preset("narrow-obs"), recipe_from_preset("joint-obs", seed=1)]
    with pytest.raises(ValueError, match=r"have seed \[0, 1\], but one collection has one. Make them equal"):
        calibrate_moe(original("qwen3_moe"), recipes, tmp_path / "stats", calibration=tokens)
    with pytest.raises(ValueError, match="No recipe is given"):
        calibrate_moe(original("qwen3_moe"), [], tmp_path / "stats", calibration=tokens)
    assert not (tmp_path / "stats").exists()
