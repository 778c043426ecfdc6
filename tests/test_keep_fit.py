"""keep="fit" in a recipe, a configuration, a YAML file and on the command line: a number before work starts."""

import json

import pytest
import yaml
from tiny_models import tiny_config, tiny_model
from typer.testing import CliRunner

from hf_mcsmoe import MergedSparseMoeConfig, Recipe, compress_moe, plan
from hf_mcsmoe.cli import app
from hf_mcsmoe.fitting import activation_bytes, cache_bytes, fit_recipe, resolve_fit
from hf_mcsmoe.loading import empty_model
from hf_mcsmoe.recipe_reading import recipe_from_dict, recipe_from_preset, recipe_from_yaml

ASKED = {"keep": "fit", "fit": 250_000, "context_length": 16, "rows": 2}


def test_a_recipe_says_it_in_every_way_alike(tmp_path):
    recipe = Recipe(**ASKED)
    assert Recipe(**{**ASKED, "keep": None}) == recipe  # a memory alone asks for it
    assert MergedSparseMoeConfig(**ASKED).to_recipe() == recipe
    assert MergedSparseMoeConfig(**ASKED).fit == 250_000
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(ASKED))
    assert recipe_from_yaml(tmp_path / "recipe.yaml") == recipe
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert Recipe(fit="24 GB").fit == "24 GB" and Recipe(fit="24GB").keep == "fit"
    assert set(Recipe(keep=0.5).to_dict()) <= {"keep", "layout", "allocation"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": "fit"}, r"keep is 'fit', but fit is None. Give the memory, such as fit='24GB'"),
        ({"keep": "fits", "fit": "1GB"}, r"fit is '1GB', but keep is 'fits'"),
        ({"keep": "half"}, r"keep is 'half', it must be in \(0, 1\] or 'fit'"),
        ({"keep": 0.5, "fit": "24GB"}, r"fit is '24GB', but keep is 0.5. Use keep='fit', or leave fit out"),
        ({"num_experts": 4, "fit": "24GB"}, r"fit is '24GB', but num_experts is 4"),
        ({"context_length": 4096}, r"context_length is 4096, but keep is 0.5"),
        ({"fit": "24 parsecs"}, r"The size '24 parsecs' is not one"),
        ({"fit": "24GB", "rows": 0}, r"rows is 0, it must be a whole number >= 1"),
        ({"fit": "24GB", "context_length": "long"}, r"context_length is 'long', it must be a whole number"),
        ({"fit": "24GB", "selection": "gated_energy", "keep_experts": 1.5}, r"keep_experts is 1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


@pytest.mark.slow
def test_the_number_is_that_of_fit_recipe_and_the_report_says_why(original, tokens, tmp_path):
    model = original("qwen3_moe")
    found = fit_recipe(model, recipe_from_preset("joint-obs"), ASKED["fit"], context_length=16, batch_size=2)
    assert 0.3 < found.recipe.keep < 1
    recipe = recipe_from_preset("joint-obs", **ASKED)
    assert plan(model, recipe) == plan(model, found.recipe)
    result = compress_moe(model, recipe, calibration=tokens, output_dir=tmp_path / "out", progress=False)
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text())
    assert report["fit"] == result.compression_report.fit == found.to_dict()
    assert report["fit"]["budget"] == 250_000 and report["fit"]["context_length"] == 16
    assert "is the most that fits 0.00025 GB" in report["fit"]["reason"]
    assert report["recipe"]["keep"] == found.recipe.keep and "fit" not in report["recipe"]
    total = report["total_bytes_after"] + cache_bytes(model, 16, 2) + activation_bytes(model, 32)
    assert total <= 250_000 and report["total_bytes_after"] <= found.weights
    again = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert again["keep"] == found.recipe.keep and "fit" not in again


def test_streaming_says_it_too(checkpoint, stream):
    folder = checkpoint("qwen3_moe")
    result = stream(folder, fit=120_000, context_length=16, selection="gated_energy", merging=None)
    report = result.compression_report
    assert report.fit["keep"] == report.recipe["keep"] < 1 and report.fit["budget"] == 120_000


def test_the_dtype_that_the_model_is_loaded_in_counts():
    model = empty_model(tiny_config("qwen3_moe"))
    recipe = Recipe(**ASKED)
    wide, _ = resolve_fit(model, recipe)
    narrow, found = resolve_fit(model, recipe, dtype="bfloat16")
    assert narrow.keep == 1 > wide.keep and found.cache == cache_bytes(model, 16, 2) // 2


def test_what_cannot_fit_is_refused_before_anything_runs(tokens):
    model = tiny_model("qwen3_moe")
    model.forward = None
    with pytest.raises(ValueError, match="but the smallest result takes"):
        compress_moe(model, Recipe(fit=20_000, context_length=16), calibration=tokens)


@pytest.mark.slow
def test_auto_fits_all_of_its_candidates(original, tokens):
    recipe = recipe_from_preset("auto", **ASKED)
    result = compress_moe(original("qwen3_moe"), recipe, calibration=tokens, progress=False)
    assert result.compression_report.fit["keep"] == result.compression_report.recipe["keep"]


@pytest.mark.slow
def test_the_command_line_and_a_file_agree(tmp_path):
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"preset": "joint-obs", **ASKED}))

    def planned(*options):
        done = CliRunner().invoke(app, ["plan", str(tmp_path), "--json", *options])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)["recipe"]["keep"]

    said = ["--fit", "250000", "--context-length", "16", "--rows", "2"]
    of_file = planned("--config", str(tmp_path / "recipe.yaml"))
    assert of_file == planned("--preset", "joint-obs", *said) != 0.25
    assert planned("--config", str(tmp_path / "recipe.yaml"), "--keep", "0.25") == 0.25
    assert planned("--config", str(tmp_path / "recipe.yaml"), "--fit", "230000") < of_file
