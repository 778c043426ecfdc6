"""The commands on models whose experts are not dense: decomposed, or of different widths."""

import json

import pytest
from test_cli import bytes_of_tensors, fail, succeed, tiny, tokens  # noqa: F401
from transformers import AutoModelForCausalLM

from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.planning import plan
from hf_mcsmoe.recipe_reading import recipe_from_dict, recipe_from_preset
from hf_mcsmoe.sizes import measure

RAGGED = """
keep: 0.5
similarity: null
grouping: drop
alignment: null
merging: null
selection: gated_obs
refit: least_squares
exclude_layers: [0]
"""
DECOMPOSED = ("--preset", "mc-smoe", "--keep", "0.5", "--allocation", "uniform", "--rank", "3")


@pytest.fixture(scope="module")
def decomposed(tiny, tokens, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("results") / "decomposed"
    return folder, succeed("compress", tiny, "--output", folder, *DECOMPOSED, "--calibration", tokens)


@pytest.fixture(scope="module")
def ragged(tiny, tokens, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("results")
    (folder / "recipe.yaml").write_text(RAGGED)
    out = folder / "ragged"
    succeed("compress", tiny, "--output", out, "--config", folder / "recipe.yaml", "--calibration", tokens)
    return out


def test_the_preset_of_the_paper_writes_what_plan_predicts(tiny, decomposed):  # noqa: F811
    folder, text = decomposed
    recipe = recipe_from_preset(
        "mc-smoe", keep=0.5, allocation="uniform", decomposition_options={"rank": 3, "keep_rows": 0.1}
    )
    assert bytes_of_tensors(folder) == plan(tiny, recipe).total_bytes_after
    assert recipe_from_dict(json.loads((folder / "compression_report.json").read_text())["recipe"]) == recipe
    values = json.loads(succeed("plan", tiny, *DECOMPOSED, "--json"))
    assert values["total_bytes_after"] == bytes_of_tensors(folder)
    card = (folder / "README.md").read_text()
    assert "`mc-smoe`: Merge, Then Compress" in card and "loses much without one" in card
    assert "factors of rank 3 plus 10% of the rows" in card
    assert "import hf_mcsmoe" in text


def test_inspect_shows_ranks_rows_and_sizes(decomposed):
    folder, _ = decomposed
    text = " ".join(succeed("inspect", folder).split())
    # A tenth of 24 rows of gate and up, and of 32 of down, rounded half up: 2, 2 and 3 of 80.
    assert "32x24, rank 3 + 8.75% rows" in text and "4 of 8" in text
    assert "already compressed" in text and "LowRankSparseQwen3MoeExperts, routed by Qwen3MoeTopKRouter" in text
    values = json.loads(succeed("inspect", folder, "--json"))
    (group,) = values["moe_layers"]
    assert (group["layers"], group["num_experts"], group["num_slots"], group["top_k"]) == (3, [4, 4, 4], 8, 2)
    assert (group["form"], group["rank"], group["name"]) == ("low_rank_sparse", 3, "model.layers.{0-2}.mlp.experts")
    assert group["kept_rows"] == [(2 + 2 + 3) / (24 + 24 + 32)] * 3
    numbers = 3 * 3 * (24 + 32) + 2 * 2 * 32 + 3 * 24
    assert group["parameters_per_expert"] == numbers and group["bytes_per_expert"] == 4 * numbers + 8 * 7
    assert values["sizes"]["total_bytes"] == bytes_of_tensors(folder)
    assert values["sizes"]["expert_parameters"] == 3 * 4 * numbers


def test_inspect_shows_widths(ragged):
    values = json.loads(succeed("inspect", ragged, "--json"))
    dense, formed = values["moe_layers"]
    assert (dense["form"], dense["layers"], dense["num_experts"], dense["mean_widths"]) == ("dense", 1, [8], [24])
    assert (formed["form"], formed["layers"], formed["num_experts"]) == ("ragged", 2, [8, 8])
    model = AutoModelForCausalLM.from_pretrained(ragged)
    neurons = [experts.up.shape[0] for experts in form_layers(model).values()]
    assert formed["mean_widths"] == [number / 8 for number in neurons] and formed["intermediate_size"] == 24
    assert formed["parameters_per_expert"] == sum(neurons) * 3 * 32 // 16
    assert values["sizes"]["total_bytes"] == bytes_of_tensors(ragged)
    sizes = measure(model, find_layers(model))
    assert sizes.expert_parameters == 8 * 3 * 24 * 32 + sum(neurons) * 3 * 32
    rest = sizes.active_parameters - 2 * 3 * 24 * 32 - sum(2 * 3 * 32 * number // 8 for number in neurons)
    table = model.get_input_embeddings().weight.numel()
    assert rest == sum(p.numel() for p in model.parameters()) - sizes.expert_parameters - table
    text = " ".join(succeed("inspect", ragged).split())
    assert f"32x{neurons[0] / 8:.4g}" in text and "of 24" in text and "RaggedQwen3MoeExperts" in text


@pytest.mark.slow
def test_they_are_evaluated_like_any_other(tiny, tokens, decomposed, ragged):  # noqa: F811
    for folder in (decomposed[0], ragged):
        words = ("--baseline", tiny, "--data", tokens, "--json", "--save")
        values = json.loads(succeed("evaluate", folder, *words))
        assert values["overall"]["kl"] > 0 and values["overall"]["tokens"] == 24 * 19
        assert "evaluation" in json.loads((folder / "compression_report.json").read_text())


def test_they_are_not_compressed_again(tokens, decomposed, ragged, tmp_path):  # noqa: F811
    for folder in (decomposed[0], ragged):
        words = ("--output", tmp_path / "out", "--calibration", tokens)
        fail("MergedQwen3MoeForCausalLM is already compressed", "compress", folder, *words)
        fail("is already compressed", "plan", folder)
    assert not (tmp_path / "out").exists()
