"""What is chosen for a budget is the largest that fits it, with a cache as large as generation makes it."""

import json

import pytest
import torch
from tiny_models import CAUSAL_FAMILIES, in_every_run, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from hf_mcsmoe import plan
from hf_mcsmoe.cli import app
from hf_mcsmoe.fitting import activation_bytes, cache_bytes, collect_tensors, fit_recipe, parse_bytes, with_keep
from hf_mcsmoe.loading import empty_model
from hf_mcsmoe.recipe_reading import recipe_from_preset


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), (1000, 1000), ("7", 7), ("2 kb", 2000), ("0.5TB", 5 * 10**11)],
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 parsecs", "-3GB", "0", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"is not one. Give bytes as a number, or a text such as 24GB"):
        parse_bytes(text)


@pytest.mark.parametrize("model_type", in_every_run(CAUSAL_FAMILIES))
def test_the_cache_is_that_of_a_real_forward(model_type):
    model = tiny_model(model_type)
    with torch.no_grad():
        kept = model(input_ids=torch.ones(2, 40, dtype=torch.int64), use_cache=True).past_key_values
    found = {}
    collect_tensors(kept, found)
    assert cache_bytes(empty_model(model.config), 40, 2) == sum(t.numel() * t.element_size() for t in found.values())


def test_the_cache_of_a_large_model_is_that_of_its_formula():
    config = AutoConfig.for_model(
        "qwen3_moe", num_hidden_layers=48, num_key_value_heads=4, head_dim=128, hidden_size=2048, dtype="bfloat16"
    )
    assert cache_bytes(empty_model(config), 4096, 2) == 2 * 48 * 4 * 128 * 4096 * 2 * 2


@pytest.mark.parametrize(("preset", "layout"), [("m-smoe", "mapped"), ("reap", "native"), ("joint-obs", "mapped")])
@pytest.mark.parametrize("share", [0.45, 0.7, 0.9])
def test_the_largest_that_fits_is_chosen(preset, layout, share):
    model = empty_model(tiny_config("qwen3_moe"))
    recipe = recipe_from_preset(preset, layout=layout, keep=0.3)
    other = cache_bytes(model, 64, 1) + activation_bytes(model, 64)
    whole = plan(model, recipe_from_preset(preset, layout=layout, keep=1.0)).total_bytes_before
    budget = other + int(share * whole)
    found = fit_recipe(model, recipe, budget, context_length=64)
    assert found.weights + found.cache + found.activations <= budget
    assert found.weights == plan(model, found.recipe).total_bytes_after
    assert found.recipe.preset == preset and found.recipe.layout == layout
    larger = plan(model, with_keep(recipe, round(found.recipe.keep * 512) + 1)).total_bytes_after
    assert larger + other > budget


def test_what_fits_whole_is_kept_whole_and_what_cannot_fit_is_refused():
    model = empty_model(tiny_config("mixtral"))
    assert fit_recipe(model, recipe_from_preset("m-smoe"), "1GB", context_length=64).recipe.keep == 1
    with pytest.raises(ValueError, match=r"The budget is 2e-05 GB, but the smallest result takes .* Give more memory"):
        fit_recipe(model, recipe_from_preset("m-smoe"), 20_000, context_length=64)
    with pytest.raises(ValueError, match="context_length is 0, it must be at least 1"):
        fit_recipe(model, recipe_from_preset("m-smoe"), "1GB", context_length=0)
    # A router that picks 2 of 8 experts needs 2: a quarter is the least.
    with pytest.raises(ValueError, match="the smallest result takes"):
        fit_recipe(model, recipe_from_preset("reap"), 20_000, context_length=64)


def test_the_commands_choose_and_say_why(tmp_path):
    config = tiny_config("qwen3_moe")
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    command = ["plan", str(tmp_path), "--preset", "joint-obs", "--fit", str(size), "--context-length", "16"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "is the most that fits" in " ".join(shown.output.split()) and "cache of 1 x 16 tokens" in shown.output
    values = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)
    assert 0.5 < values["recipe"]["keep"] < 1 and values["total_bytes_after"] < size
    both = CliRunner().invoke(app, [*command, "--keep", "0.5"])
    assert both.exit_code == 2
