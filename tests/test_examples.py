import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_quickstart_halves_the_experts_and_writes_on(tmp_path):
    printed = run(str(EXAMPLES / "quickstart.py"), "--output", str(tmp_path / "out"))
    assert "2,827,648 -> 1,648,000 parameters" in printed  # 64 -> 32 experts of 3 * 96 * 128 numbers each
    assert "def read_file(path):" in printed
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_operator_from_outside_of_the_package_merges_and_is_measured():
    lines = run(str(EXAMPLES / "your_own_merging_operator.py")).splitlines()
    losses = {line.split(":")[0]: [float(word) for word in line.split() if word[0].isdigit()] for line in lines}
    assert set(losses) == {"weighted_average", "largest_magnitude"}
    for before, after in losses.values():
        assert 2 < before < 4 and before < after  # a trained model, made worse by merging


@pytest.mark.slow
def test_the_script_that_made_the_tiny_model_runs(tmp_path):
    run(str(EXAMPLES / "train_tiny_moe.py"), "--output", str(tmp_path), "--max-steps", "2")
    assert (tmp_path / "tiny-qwen3-moe" / "model.safetensors").is_file()
    assert (tmp_path / "calibration.jsonl").stat().st_size > 100_000


@pytest.mark.slow
def test_a_compressed_model_is_recovered(tmp_path):
    size = ("--max-steps", "1", "--evaluation-rows", "1")
    printed = run(str(EXAMPLES / "recover_with_trainer.py"), "--output", str(tmp_path / "out"), *size)
    losses = {
        line.split(":")[0]: float(line.split()[2].rstrip(",")) for line in printed.splitlines() if "loss " in line
    }
    assert losses["original"] < losses["compressed"] and losses["recovered"] != losses["compressed"]
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "rows"),
    [
        ("decomposition.py", ("--rank", "8", "--rows", "2", "--evaluation-rows", "2"), ("plain", "whitened, rows by")),
        (
            "expert_forms.py",
            ("--experts", "4", "--hidden", "64", "--width", "64", "--rank", "4", "--tokens", "32", "--repeats", "1"),
            ("decomposed / dense", "ragged / uniform"),
        ),
        ("distillation_memory.py", ("--tokens", "64", "--vocabulary", "512"), ()),
    ],
    ids=["decomposition", "expert_forms", "distillation_memory"],
)
def test_the_benchmarks_of_recovery_run(script, arguments, rows):
    printed = run(str(EXAMPLES / "benchmarks" / script), *arguments)
    assert printed.strip() and all(row in printed for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["calibration_cost.py", "m_smoe.py", "collapse_duplicates.py", "fidelity.py"])
def test_the_benchmarks_run(script, tmp_path):
    assets = EXAMPLES.parent / "hf_mcsmoe" / "assets"
    model = ["--model", str(assets / "tiny-qwen3-moe")]
    arguments = {
        "calibration_cost.py": [*model, "--rows", "4", "--repeats", "1"],
        "m_smoe.py": [
            *model,
            *("--calibration", str(assets / "calibration.jsonl"), "--data", str(assets / "evaluation.jsonl")),
            *("--keep", "0.5", "--rows", "8", "--evaluation-rows", "4", "--json", str(tmp_path / "numbers.json")),
        ],
        "fidelity.py": [
            *model,
            *("--rows", "4", "--evaluation-rows", "2", "--recipes", "joint-obs", "--keep", "0.5"),
            *("--output", str(tmp_path / "fidelity")),
        ],
        "collapse_duplicates.py": ["--tokens", "64", "--hidden", "32", "--width", "32", "--repeats", "1"],
    }
    assert "|" in run(str(EXAMPLES / "benchmarks" / script), *arguments[script]) or script == "calibration_cost.py"
