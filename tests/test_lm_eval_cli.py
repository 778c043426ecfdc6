"""A mapped result in the command line of lm-evaluation-harness, which knows this package by the shim alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_mcsmoe
from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.loading import load_model, load_tokenizer

TASKS = Path(__file__).parent / "data" / "lm_eval"
ORIGINAL = Path(hf_mcsmoe.__file__).parent / "assets" / "tiny-qwen3-moe"


def log_likelihood(model, tokenizer, prompt, choice):
    """Sum of the log-probabilities of the tokens of `choice` after those of `prompt`."""
    start, ids = len(tokenizer(prompt).input_ids), tokenizer(prompt + choice).input_ids
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(scores[place - 1, ids[place]].item() for place in range(start, len(ids)))


@pytest.mark.slow
def test_the_command_line_of_lm_eval_scores_a_mapped_result(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install hf-mcsmoe[export-tests]")
    folder = tmp_path / "mapped"
    rows = torch.randint(0, 2000, (8, 32), generator=torch.Generator().manual_seed(0))
    tokenizer = load_tokenizer(ORIGINAL)
    model = load_model(ORIGINAL, dtype=torch.float32)
    compress_moe(model, Recipe(keep=0.5), calibration=rows, tokenizer=tokenizer, output_dir=folder, progress=False)
    model_args = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model_args, "--device", "cpu"]
    command += ["--tasks", "python_names", "--include_path", str(TASKS), "--output_path", str(tmp_path / "results")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(command, cwd=TASKS, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    (written,) = (tmp_path / "results").rglob("results_*.json")
    result = json.loads(written.read_text())["results"]["python_names"]
    documents = [json.loads(line) for line in (TASKS / "python_names.jsonl").read_text().splitlines()]
    model, right = load_model(folder), 0
    for document in documents:
        scores = [log_likelihood(model, tokenizer, document["prompt"], choice) for choice in document["choices"]]
        right += scores.index(max(scores)) == document["answer"]
    assert 3 < right < len(documents)  # better than chance, and not by the form of the task
    assert result["acc,none"] == pytest.approx(right / len(documents))
