import json

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_mcsmoe.cli import app
from hf_mcsmoe.loading import load_model
from hf_mcsmoe.publishing import read_report


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


@pytest.fixture
def mapped(write_compressed):
    return write_compressed("qwen3_moe", keep=0.5, allocation="uniform")


def test_export_says_what_it_did_and_how_to_load_the_result(mapped, tmp_path):
    result = run("export", mapped, "--layout", "native", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for line in read_report(tmp_path / "out")["export"]["changes"]:
        assert f"- {line}" in result.stdout
    assert "How far the result is from the mapped one was not measured; --measure does." in result.stdout
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path / "out"}")' in result.stdout
    assert "import hf_mcsmoe" not in result.stdout
    assert load_model(tmp_path / "out").config.num_experts == 4


def test_export_measures_on_the_data_that_is_given(mapped, tmp_path, tokens):
    np.save(tmp_path / "held_out.npy", tokens[:8].numpy())
    result = run("export", mapped, "--output", tmp_path / "out", "--data", tmp_path / "held_out.npy")
    assert result.exit_code == 0, result.output
    scores = read_report(tmp_path / "out")["export"]["against_mapped"]
    assert set(scores["domains"]) == {"held_out"} and scores["overall"]["tokens"] == 8 * 19
    assert f"KL of the mapped model to this one: {scores['overall']['kl']:.4f} nats per token" in result.stdout


def test_export_as_json_is_what_the_report_says(mapped, tmp_path):
    result = run("export", mapped, "--output", tmp_path / "out", "--json")
    assert json.loads(result.stdout) == read_report(tmp_path / "out")["export"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "mapped"], "--layout is 'mapped'; a result can be exported to 'native'. Leave it out for that."),
        (["--router", "dominant"], "Unknown router treatment 'dominant'; choose one of ['dominant_rows']"),
        (["--measure"], "tokenizer"),
    ],
)
def test_export_refuses_before_it_writes(options, message, mapped, tmp_path):
    result = run("export", mapped, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()
