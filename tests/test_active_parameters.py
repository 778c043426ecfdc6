import pytest
import torch
from tiny_models import tiny_model

from hf_mcsmoe import compress_moe
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.planning import plan
from hf_mcsmoe.recipe import Recipe
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.sizes import measure

TOKENS = torch.randint(3, 160, (12, 20), generator=torch.Generator().manual_seed(0))
RECIPES = {
    "mapped": Recipe(keep=0.5),
    "native": Recipe(keep=0.5, layout="native"),
    "fewer experts than top-k": Recipe(num_experts=1, allocation="uniform"),
    "one layer left out": Recipe(keep=0.5, exclude_layers=(0,)),
    "ragged": recipe_from_preset("joint-obs", keep=0.5),
    "narrow": recipe_from_preset("narrow-obs", keep=0.5),
    "decomposed": Recipe(keep=0.5, decomposition="low_rank_sparse", decomposition_options={"rank": 2}),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_active_parameters_are_those_of_the_result(recipe):
    model = tiny_model("qwen3_moe")
    before, planned = measure(model, find_layers(model)).active_parameters, plan(model, recipe)
    result = compress_moe(model, recipe, calibration=TOKENS, progress=False)
    report, after = result.compression_report, measure(result, find_layers(result)).active_parameters
    assert report.active_parameters_before == before == planned.active_parameters_before
    # An average expert of a layer is rounded down in the one or the other place.
    assert report.active_parameters_after == pytest.approx(after, abs=len(report.layers))
    assert report.active_parameters_after < before or recipe in (RECIPES["mapped"], RECIPES["one layer left out"])


def test_experts_that_two_layers_share_count_for_both():
    model = tiny_model("switch_transformers")
    result = compress_moe(model, Recipe(num_experts=1), calibration=TOKENS, progress=False)
    after = measure(result, find_layers(result)).active_parameters
    assert result.compression_report.active_parameters_after == pytest.approx(after, abs=4)


@pytest.mark.parametrize("layout", ["mapped", "native"])
def test_streaming_counts_the_same(tmp_path, layout):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    recipe = Recipe(keep=0.5, layout=layout)
    how = {"calibration": TOKENS, "progress": False, "overwrite": True}
    reports = [
        compress_moe(tmp_path / "model", recipe, output_dir=tmp_path / "out", executor=name, **how).compression_report
        for name in ("in_memory", "streaming")
    ]
    for name in ("active_parameters_before", "active_parameters_after"):
        assert getattr(reports[0], name) == getattr(reports[1], name) > 0
