import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_clients import environment
from hub_server import Hub

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    environment = environment or {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_halves_the_experts_and_writes_on(tmp_path):
    printed = run(str(EXAMPLES / "quickstart.py"), "--output", str(tmp_path / "out"))
    assert "2,827,648 -> 1,648,000 parameters" in printed  # 64 -> 32 experts of 3 * 96 * 128 numbers each
    assert "def read_file(path):" in printed
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.slow
def test_an_operator_from_outside_of_the_package_merges_and_is_measured():
    lines = run(str(EXAMPLES / "your_own_merging_operator.py")).splitlines()
    losses = {line.split(":")[0]: [float(word) for word in line.split() if word[0].isdigit()] for line in lines}
    assert set(losses) == {"weighted_average", "largest_magnitude"}
    for before, after in losses.values():
        assert 2 < before < 4 and before < after  # a trained model, made worse by merging


@pytest.mark.slow
def test_a_report_is_read():
    lines = run(str(EXAMPLES / "reading_a_report.py")).splitlines()
    assert "5,655,296 -> 3,296,000 bytes (58.3%)" in lines
    layers = [line for line in lines if "output error 0." in line]
    assert len(layers) == 4 and sum("similarity " in line for line in lines) == 4
    kept = [int(line.split(" experts")[0].split()[-1]) for line in layers]
    assert sum(kept) == 32


@pytest.mark.slow
def test_a_large_model_is_streamed(tmp_path):
    printed = run(str(EXAMPLES / "stream_a_large_model.py"), "--output", str(tmp_path / "half"), "--num-samples", "16")
    assert re.search(r"planned: 5,6\d\d,\d{3} -> 3,\d{3},\d{3} bytes", printed)
    assert "in 1 pass" in printed and "interrupted run had done: 0 of 4" in printed
    assert (tmp_path / "half" / "compression_report.html").is_file()


@pytest.mark.slow
def test_a_model_is_compressed_evaluated_and_published(tmp_path):
    hub = Hub({"hf_aliceMayWrite0123456789": ("alice", True)})
    online = environment(hub.endpoint, tmp_path / "home", "hf_aliceMayWrite0123456789")
    arguments = ("--output", str(tmp_path / "half"), "--repo", "alice/half", "--rows", "2")
    try:
        printed = run(str(EXAMPLES / "compress_and_publish.py"), *arguments, environment=online)
        files = hub.repositories["alice/half"].files()
    finally:
        hub.close()
    before, after = (float(printed.split(word)[1].split()[0]) for word in ("loss ", " -> "))
    assert 2 < before < after < before + 1
    assert {"compression_report.html", "plots/layers.png", "README.md", "config.json"} <= files.keys()
    assert any(name.startswith("model") and name.endswith(".safetensors") for name in files)
    assert "/commit/" in printed and b"not evaluated." not in files["README.md"].split(b"## Evaluation")[1][:200]


@pytest.mark.slow
def test_the_script_that_made_the_tiny_model_runs(tmp_path):
    run(str(EXAMPLES / "train_tiny_moe.py"), "--output", str(tmp_path), "--max-steps", "2")
    assert (tmp_path / "tiny-qwen3-moe" / "model.safetensors").is_file()
    assert (tmp_path / "calibration.jsonl").stat().st_size > 100_000


@pytest.mark.slow
def test_a_compressed_model_is_recovered(tmp_path):
    size = ("--max-steps", "2", "--evaluation-rows", "1")  # the first step only warms up
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


@pytest.mark.slow
def test_the_benchmark_of_all_methods_goes_on_where_it_was(tmp_path):
    assets = EXAMPLES.parent / "hf_mcsmoe" / "assets"
    files = ["--calibration", str(assets / "calibration.jsonl"), "--data", str(assets / "evaluation.jsonl")]
    limits = ["--rows", "4", "--evaluation-rows", "2", "--keep", "0.5", "--seeds", "0,1", "--output", str(tmp_path)]
    command = [str(EXAMPLES / "benchmarks" / "methods.py"), "--model", str(assets / "tiny-qwen3-moe"), *files, *limits]
    run(*command, "--methods", "reap", "--alone")
    first = json.loads((tmp_path / "methods.json").read_text())
    assert [(row["layout"], row["seed"]) for row in first["compared"]] == [
        ("mapped", 0),
        ("native", 0),
        ("mapped", 1),
        ("native", 1),
    ]
    assert first["alone"][0]["seconds"] > 0
    run(*command, "--methods", "reap,frequency")
    both = json.loads((tmp_path / "methods.json").read_text())
    assert both["compared"][:4] == first["compared"] and len(both["compared"]) == 8
    table = (tmp_path / "methods.md").read_text()
    (alone,) = both["alone"]
    over = alone["seconds"] - 1.5 * alone["forward_seconds"] - 5
    ratio = alone["seconds"] / alone["forward_seconds"]
    assert f"| {alone['seconds']:.1f} | {ratio:.2f} | {over:+.1f} |" in table
    assert "Longer than that: none, of 1." in table or over > 0
    assert table.count("| `reap` |") == 3 and "seeds [0, 1]" in table and (tmp_path / "methods.png").is_file()
