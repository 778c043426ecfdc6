import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_mcsmoe.cli import app
from hf_mcsmoe.cli.options import build_recipe
from hf_mcsmoe.cli.tables import human, human_bytes, name_pattern, span
from hf_mcsmoe.loading import load_model
from hf_mcsmoe.planning import plan
from hf_mcsmoe.recipe import Recipe
from hf_mcsmoe.recipe_reading import recipe_from_preset

VERBS = (
    *("demo", "families", "inspect", "plan", "compress", "evaluate", "cache-teacher", "recover"),
    *("export", "report", "push"),
)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(message, *arguments):
    """The command ends with exit code 2 and one line on stderr that matches `message`."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), result.stderr
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model with a tokenizer of one word per token, on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("qwen3_moe").save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(160)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """24 rows of 20 tokens in a file."""
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.save(path, torch.randint(3, 160, (24, 20), generator=torch.Generator().manual_seed(0)).numpy())
    return path


@pytest.fixture(scope="module")
def compressed(tiny, tokens, tmp_path_factory):
    """The tiny model compressed by the command line, and what it printed."""
    folder = tmp_path_factory.mktemp("results") / "half"
    output = succeed("compress", tiny, "--output", folder, "--keep", "0.5", "--calibration", tokens)
    return folder, output


def test_help_lists_the_verbs_and_every_verb_has_an_example():
    text = succeed("--help")
    for verb in VERBS:
        assert verb in text
        assert f"Example: hf-mcsmoe {verb}" in " ".join(succeed(verb, "--help").split())


def test_the_shell_completes_verbs_and_methods(monkeypatch):
    assert "--install-completion" in succeed("--help")
    cases = [("hf-mcsmoe comp", "compress", "plan"), ("hf-mcsmoe plan m --preset na", "narrow-obs", "m-smoe")]
    for typed, offered, other in cases:
        monkeypatch.setenv("_HF_MCSMOE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        completed = CliRunner().invoke(app, [], prog_name="hf-mcsmoe").output.split()
        assert offered in completed and other not in completed


def test_without_a_verb_the_help_is_shown():
    assert "Usage" in run().output


def test_version_is_that_of_the_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", succeed("--version"))


def test_bad_input_is_one_line_and_exit_code_2(tiny, tmp_path):
    fail("no folder or file '.*/tinny'. Did you mean 'tiny'", "inspect", tiny.parent / "tinny")
    fail("has no config.json", "plan", tmp_path)
    fail("Unknown preset 'm-smoo'.*Did you mean 'm-smoe'", "plan", tiny, "--preset", "m-smoo")
    fail("No recipe file", "plan", tiny, "--config", "m-smoo.yaml")
    fail("both name a recipe", "plan", tiny, "--config", "m-smoe", "--preset", "m-smoe")
    fail(r"keep is 1.5, it must be in \(0, 1\]", "plan", tiny, "--keep", "1.5")
    fail("they say the same", "plan", tiny, "--keep", "0.5", "--num-experts", "2")
    fail("model has 3 MoE layers", "plan", tiny, "--exclude-layer", "7")
    fail("num_experts is 9, but .* has 8 experts", "plan", tiny, "--num-experts", "9")


def test_a_traceback_is_shown_on_request(tmp_path):
    result = run("--traceback", "inspect", tmp_path)
    assert isinstance(result.exception, FileNotFoundError)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)], env={"HF_MCSMOE_TRACEBACK": "1"})
    assert isinstance(result.exception, FileNotFoundError)


def test_inspect_shows_layers_and_sizes_of_a_configuration_alone(tmp_path):
    tiny_config("deepseek_v3", dtype="bfloat16").save_pretrained(tmp_path)
    text = succeed("inspect", tmp_path)
    assert "DeepseekV3ForCausalLM, bfloat16" in text
    assert "model.layers.{1-2}.mlp.experts" in text and "2 in 2 groups" in text
    assert "Layouts: mapped, native" in text
    values = json.loads(succeed("inspect", tmp_path, "--json"))
    (group,) = values["moe_layers"]
    assert (group["layers"], group["num_slots"], group["num_experts"]) == (2, 8, [8, 8])
    assert (group["hidden_size"], group["intermediate_size"], group["top_k"]) == (32, 24, 2)
    assert group["parameters_per_expert"] == 3 * 24 * 32 and group["bytes_per_expert"] == 2 * 3 * 24 * 32
    model = tiny_model("deepseek_v3")
    assert values["sizes"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert values["compressed"] is False and values["layouts"] == ["mapped", "native"]


def test_inspect_says_why_a_layout_is_not_possible(tmp_path):
    from transformers import JetMoeConfig

    config = JetMoeConfig(hidden_size=32, intermediate_size=40, num_hidden_layers=1, kv_channels=8, vocab_size=160)
    config.save_pretrained(tmp_path)
    text = " ".join(succeed("inspect", tmp_path).split())
    assert "Layouts: mapped" in text and text.count("one number of experts for this layer and for the attention") == 1


def test_inspect_of_a_dense_model_says_so(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    assert "LlamaForCausalLM has no MoE layer" in succeed("inspect", tmp_path)


def test_inspect_shows_a_compressed_folder(compressed):
    folder, _ = compressed
    text = succeed("inspect", folder)
    assert "compressed, mapped layout" in text and "of 8" in text and "already compressed" in text
    values = json.loads(succeed("inspect", folder, "--json"))
    assert sum(sum(group["num_experts"]) for group in values["moe_layers"]) == 3 * 4
    assert values["sizes"]["total_bytes"] == bytes_of_tensors(folder)


def test_plan_prints_what_the_function_returns(tiny):
    values = json.loads(succeed("plan", tiny, "--num-experts", "3", "--exclude-layer", "-1", "--json"))
    expected = plan(tiny, recipe_from_preset("m-smoe", num_experts=3, exclude_layers=(-1,)))
    assert values.items() >= json.loads(json.dumps(expected.to_dict())).items()
    assert values["recipe"]["num_experts"] == 3
    text = succeed("plan", tiny, "--num-experts", "3", "--exclude-layer", "-1")
    assert "left as it is" in text and "8 -> 3 on average" in text
    assert "75.8 k" in text  # parameters before: 75,792


def test_plan_takes_presets_files_and_flags_that_change_them(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: frequency\nnum_experts: 2\nlayout: native\n")
    values = json.loads(succeed("plan", tiny, "--config", path, "--json"))
    assert values["layout"] == "native" and values["layers"][0]["experts_after"] == 2
    values = json.loads(succeed("plan", tiny, "--config", path, "--keep", "0.75", "--layout", "mapped", "--json"))
    assert values["layout"] == "mapped" and values["layers"][0]["experts_after"] == 6
    values = json.loads(succeed("plan", tiny, "--config", "frequency", "--json"))
    assert values["recipe"]["grouping"] == "drop"


def test_options_make_a_recipe():
    recipe = build_recipe(keep=0.25, layout="native", exclude_layer=[], seed=3)
    assert recipe == recipe_from_preset("m-smoe", keep=0.25, layout="native", seed=3)
    recipe = build_recipe(num_experts=2, exclude_layer=["0", "-1", "*.mlp.experts"], allocation="uniform")
    assert recipe.exclude_layers == (0, -1, "*.mlp.experts") and recipe.keep is None
    recipe = build_recipe(preset="frequency", rank=4)
    assert (recipe.decomposition, recipe.decomposition_options) == ("low_rank_sparse", {"rank": 4})
    assert recipe.merging is None
    assert build_recipe(keep_rows=0.3).decomposition_options == {"keep_rows": 0.3}


def test_any_field_of_a_recipe_can_be_set():
    settings = ["protect=super_experts", "sequential=true", "refit_options.ridges=[0.1, 1e-3]", "fit_tokens=512"]
    recipe = build_recipe(preset="joint-obs", keep=0.25, settings=settings)
    expected = {"protect": "super_experts", "sequential": True, "fit_tokens": 512}
    assert recipe == recipe_from_preset("joint-obs", keep=0.25, refit_options={"ridges": [0.1, 1e-3]}, **expected)
    changed = build_recipe(preset="mc-smoe", settings=["decomposition_options.rank=4"])
    assert changed.decomposition_options == {**build_recipe(preset="mc-smoe").decomposition_options, "rank": 4}
    assert build_recipe(preset="mc-smoe", settings=["decomposition=null", "decomposition_options={}"]).to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["router"], r"--set 'router' must be FIELD=VALUE"),
        (["router.rows=1"], r"must be FIELD=VALUE or STEP_options.OPTION=VALUE"),
        (["fit_tokens=1", "fit_tokens=2"], r"'fit_tokens' is given twice"),
        (["layout=native"], r"'layout' is given twice, or has an option"),
        (["preset=reap"], r"'preset' is given twice, or has an option"),
        (["refit_options={"], r"'\{' is not valid YAML"),
        (["fit_token=1"], r"no field 'fit_token'.*Did you mean 'fit_tokens'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_recipe(preset="joint-obs", layout="mapped", settings=settings)


def test_plan_takes_any_field(tiny):
    values = json.loads(succeed("plan", tiny, "--set", "merging=average", "--set", "seed=7", "--json"))
    assert (values["recipe"]["merging"], values["recipe"]["seed"]) == ("average", 7)


def test_compress_writes_what_plan_predicted(tiny, compressed):
    folder, text = compressed
    assert "Plan: 75.8 k -> 48.1 k parameters" in text  # 75,792 - 3 * 4 * 3 * 24 * 32
    assert "import hf_mcsmoe" in text and str(folder) in text
    assert re.search(r"Streamed 3 decoder layers on \w+, passes: 2, read .*, wrote ", " ".join(text.split()))
    for name in ("config.json", "tokenizer.json", "compression_report.json", "recipe.yaml", "README.md"):
        assert (folder / name).is_file(), name
    assert bytes_of_tensors(folder) == plan(tiny, Recipe(keep=0.5)).total_bytes_after
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "MergedQwen3MoeForCausalLM"


def test_a_device_map_or_an_executor_in_memory_loads_the_model(tiny, tokens, compressed, tmp_path):
    expected = load_file(compressed[0] / "model-00001-of-00004.safetensors")
    for name, option in (("mapped", ("--device-map", "cpu")), ("loaded", ("--executor", "in_memory"))):
        options = ("--output", tmp_path / name, "--keep", "0.5", "--calibration", tokens, *option)
        assert "Streamed" not in succeed("compress", tiny, *options)
        found = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_compress_to_the_native_layout_gives_a_plain_model(tiny, tokens, tmp_path):
    options = ("--num-experts", "4", "--layout", "native", "--calibration", tokens, "--num-samples", "8")
    text = succeed("compress", tiny, "--output", tmp_path / "out", *options)
    assert "import hf_mcsmoe" not in text
    assert bytes_of_tensors(tmp_path / "out") == plan(tiny, Recipe(num_experts=4, layout="native")).total_bytes_after
    assert type(load_model(tmp_path / "out")).__name__ == "Qwen3MoeForCausalLM"


def test_compress_refuses_before_anything_is_written(tiny, tokens, compressed, tmp_path):
    output = tmp_path / "out"
    data = ("--output", output, "--calibration", tokens)
    fail("at least 2", "compress", tiny, "--num-experts", "1", "--layout", "native", *data)
    fail("no calibration file", "compress", tiny, "--output", output, "--calibration", tmp_path / "none.txt")
    fail("already compressed", "compress", compressed[0], *data)
    fail("exists and is not empty", "compress", tiny, "--output", compressed[0], "--calibration", tokens)
    assert not output.exists()


def test_evaluate_compares_with_the_baseline(tiny, tokens, compressed):
    folder, _ = compressed
    values = json.loads(succeed("evaluate", folder, "--baseline", tiny, "--data", tokens, "--json"))
    (score,) = values["domains"].values()
    assert list(values["domains"]) == ["tokens"] and score["tokens"] == 24 * 19
    with torch.no_grad():
        ids = torch.from_numpy(np.load(tokens))
        logits = load_model(tiny)(ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert math.isclose(score["baseline_loss"], loss, rel_tol=1e-5)
    assert score["kl"] > 0 and 0 <= score["top1_agreement"] <= 1
    text = succeed("evaluate", folder, "--baseline", tiny, "--data", tokens)
    assert "perplexity" in text and f"{math.exp(score['loss']):.2f}" in text


def test_a_model_does_not_differ_from_itself(tiny, tokens):
    text = succeed("evaluate", tiny, "--baseline", tiny, "--data", tokens, "--num-samples", "4")
    assert "0.0000" in text and "100.0%" in text


def test_evaluate_without_a_baseline_has_no_comparison(tiny, tokens):
    assert "KL" not in succeed("evaluate", tiny, "--data", tokens)


def test_evaluate_shows_what_the_models_write(tiny, tokens):
    options = ("--data", tokens, "--prompt", "w5 w6", "--max-new-tokens", "3")
    values = json.loads(succeed("evaluate", tiny, "--baseline", tiny, "--json", *options))
    (sample,) = values["samples"]
    assert sample["prompt"] == "w5 w6" and sample["model"] == sample["baseline"]
    assert 1 <= len(sample["model"].split()) <= 3
    assert "prompt: 'w5 w6'" in succeed("evaluate", tiny, *options)


def test_evaluate_adds_its_scores_to_report_and_card(compressed, tokens):
    folder, _ = compressed
    succeed("evaluate", folder, "--data", tokens, "--save")
    report = json.loads((folder / "compression_report.json").read_text())
    perplexity = report["evaluation"]["overall"]["perplexity"]
    assert f"{perplexity:.4g}" in (folder / "README.md").read_text()


def test_evaluate_refuses_what_it_cannot_do(tiny, tokens, tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "bare")
    fail("needs a tokenizer", "evaluate", tmp_path / "bare", "--data", tokens, "--prompt", "w5")
    fail("no .*compression_report.json", "evaluate", tiny, "--data", tokens, "--save")
    fail("give the domain 'tokens'", "evaluate", tiny, "--data", tokens, "--data", tokens)


def test_demo_goes_the_whole_way(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mcsmoe.cli.demo.CALIBRATION_ROWS", 16)
    monkeypatch.setattr("hf_mcsmoe.cli.demo.EVALUATION_ROWS", 4)
    text = succeed("demo", "--output", tmp_path / "out", "--layout", "native")
    parts = ("1. ", "6. ", "parameters", "perplexity", "repeated", "original: '", "m-smoe: '", "narrow-obs: '")
    for part in (*parts, "compression_report.html", "Next, try:"):
        assert part in text
    assert text.index("m-smoe:") < text.index("narrow-obs:")
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text())
    assert report["recipe"]["preset"] == "narrow-obs" and report["evaluation"]["generation"]["prompts"] == 9
    assert (tmp_path / "out" / "README.md").is_file()
    fail("exists and is not empty", "demo", "--output", tmp_path / "out")


def test_demo_without_its_assets_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mcsmoe.cli.demo.__file__", str(tmp_path / "cli" / "demo.py"))
    fail("tiny model is not in .*Reinstall hf-mcsmoe", "demo", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    "number, text",
    [(0, "0"), (512, "512"), (999, "999"), (999.9, "1.00 k"), (75_792, "75.8 k"), (733_000_000, "733 M")],
)
def test_numbers_have_three_digits(number, text):
    assert human(number) == text


def test_bytes_have_units():
    assert human_bytes(512) == "512 B"
    assert human_bytes(61_100_000_000) == "61.1 GB"
    assert human_bytes(5_200_000) == "5.20 MB"


def test_names_that_differ_in_one_number_are_one_pattern():
    names = [f"model.layers.{number}.mlp.experts" for number in (0, 1, 2, 5, 7)]
    assert name_pattern(names) == "model.layers.{0-2,5,7}.mlp.experts"
    assert name_pattern(names[:1]) == names[0]
    assert name_pattern(["a.0.b.0", "a.1.b.1"]) == "a.0.b.0 and 1 more"
    assert name_pattern(["encoder.0", "decoder.0"]) == "encoder.0 and 1 more"
    assert span([4, 3, 9, 3]) == "3-4,9"


def bytes_of_tensors(folder):
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total
