"""The experiments of examples/: their data, their tables, and that they run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("babel")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import torch  # noqa: E402
from mc_smoe.language_names import LANGUAGES, Collator, encode, names_of, read_splits, split_of  # noqa: E402
from mc_smoe.language_names import train_tokenizer as learn_pieces  # noqa: E402
from mc_smoe.scores import count_flops, score  # noqa: E402
from mc_smoe.tables import results_table, savings  # noqa: E402
from tiny_models import tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def splits():
    return read_splits()


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_no_item_and_no_name_is_in_two_splits(splits):
    items = {split: {entry.item for entry in entries} for split, entries in splits.items()}
    texts = {split: {entry.text.casefold() for entry in entries} for split, entries in splits.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not items[one] & items[other]
        assert not texts[one] & texts[other]
    assert all(split_of(entry.item) == split for split, entries in splits.items() for entry in entries)
    assert len(splits["train"]) > 15_000 and len(splits["test"]) > 3_000
    assert {entry.language for entry in splits["test"]} == set(LANGUAGES)


def test_names_have_one_language(splits):
    languages_of_text = {}
    for language in LANGUAGES:
        for entry in names_of(language):
            languages_of_text.setdefault(entry.text.casefold(), set()).add(language)
    assert all(languages_of_text[entry.text.casefold()] == {entry.language} for entry in splits["train"])
    assert all(entry.text.casefold() != "angola" for entries in splits.values() for entry in entries)


def test_rows_are_padded_and_end(splits):
    entries = splits["validation"][:40]
    tokenizer = learn_pieces(splits["train"][:2000], 400)
    rows = encode(entries, tokenizer)
    assert [tokenizer.decode(row["labels"], skip_special_tokens=True) for row in rows] == [e.language for e in entries]
    assert [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows] == [e.text for e in entries]
    assert all(row[name][-1] == tokenizer.eos_token_id for row in rows for name in row)
    batch = Collator(tokenizer.pad_token_id)(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert (batch["labels"] != -100).sum(1).tolist() == [len(row["labels"]) for row in rows]
    assert ((batch["input_ids"] == tokenizer.pad_token_id) == (batch["attention_mask"] == 0)).all()


def test_accuracy_is_that_of_greedy_decoding():
    model = tiny_model("switch_transformers")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, wanted in ((3, 3), (5, 3), (8, 2), (8, 3)):
        inputs = torch.randint(3, 150, (length,), generator=generator).tolist()
        answer = model.generate(torch.tensor([inputs]), max_new_tokens=wanted, do_sample=False)[0, 1:].tolist()
        rows.append({"input_ids": inputs, "labels": answer})
    assert score(model, rows, batch_size=2).accuracy == 1.0
    rows[1]["labels"][-1] += 1
    result = score(model, rows, batch_size=3)
    assert result.accuracy == 0.75
    losses = [model(**{name: torch.tensor([row[name]]) for name in row}).loss.item() for row in rows]
    tokens = [len(row["labels"]) for row in rows]
    assert tokens == [3, 3, 2, 3]
    loss_sum = sum(loss * count for loss, count in zip(losses, tokens, strict=True))
    assert result.loss == pytest.approx(loss_sum / sum(tokens), rel=1e-5)


def test_flops_of_experts_are_counted():
    model = tiny_model("mixtral")
    tokens, layers, hidden, width, top_k = 2 * 6, 3, 32, 40, 2
    experts = 2 * tokens * layers * top_k * 3 * hidden * width
    router = 2 * tokens * layers * hidden * 8
    attention = 2 * tokens * layers * (2 * hidden * hidden + 2 * hidden * hidden // 2)
    head = 2 * tokens * hidden * 160
    model.set_attn_implementation("sdpa")  # whose products the counter does not see on the CPU
    counted = count_flops(model, {"input_ids": torch.arange(12).reshape(2, 6)})
    assert counted == experts + router + attention + head


def test_tables_hold_mean_and_spread():
    costs = {"parameters": 100, "bytes": 400, "flops": 2e6}
    results = [
        {"model": "full", "seed": 0, "accuracy": 0.5, "loss": 1.0, **costs},
        {"model": "full", "seed": 1, "accuracy": 0.7, "loss": 1.0, **costs},
        {"model": "small", "seed": 1, "accuracy": 0.6, "loss": 1.5, **costs, "parameters": 25},
    ]
    results[2] |= {"tokens_per_second": 30.0, "full_tokens_per_second": 20.0}
    lines = results_table(results, ("accuracy", "loss", "parameters", "speed")).splitlines()
    assert lines[2] == "| full | 2 | 60.0 ± 14.1 | 1.000 | 100 |  |"
    assert lines[3] == "| small | 1 | 60.0 | 1.500 | 25 | 1.50 |"
    saved = savings(results, "small")
    assert saved == pytest.approx({"parameters_saved": 0.75, "bytes_saved": 0, "flops_saved": 0, "accuracy_lost": 0.1})


@pytest.mark.slow
def test_the_experiment_on_a_switch_transformer_runs(tmp_path):
    run("train_switch_classifier.py", "--output", str(tmp_path / "full"), "--steps", "2", "--batch-size", "32")
    arguments = ["--output", str(tmp_path / "results"), "--steps", "2", "--decomposed-steps", "8"]
    models = ["full", "m-smoe", "mc-smoe", "no distillation"]
    run("mc_smoe_switch.py", str(tmp_path / "full"), *arguments, "--models", *models)
    results = {r["model"]: r for r in json.loads((tmp_path / "results" / "switch.json").read_text())}
    assert set(results) == set(models)
    # 32 experts in the first layer and 8 in the five others; 2 * 64 * 256 numbers in each
    assert results["full"]["parameters"] - results["m-smoe"]["parameters"] == 5 * 24 * 2 * 64 * 256
    rank, rows = 3, round(0.1 * 40 * (64 + 256))
    expected = 40 * 2 * rank * (64 + 256)
    kept = results["mc-smoe"]["parameters"] - (results["m-smoe"]["parameters"] - 40 * 2 * 64 * 256) - expected
    assert 64 * rows * 0.9 < kept < 256 * rows * 1.1  # rows of 64 or 256 numbers
    assert results["mc-smoe"]["flops"] < results["full"]["flops"]
    assert results["mc-smoe"]["bytes"] < results["m-smoe"]["bytes"] < results["full"]["bytes"]
    assert "mc-smoe" in (tmp_path / "results" / "switch.md").read_text()


@pytest.mark.slow
def test_the_experiment_on_a_causal_model_runs(tmp_path):
    size = ["--steps", "4", "--batch-size", "2", "--sequence-length", "64", "--eval-rows", "8"]
    printed = run("mc_smoe_causal.py", *size, "--output", str(tmp_path))
    results = json.loads((tmp_path / "causal.json").read_text())["results"]
    assert [r["model"] for r in results] == ["full", "m-smoe", "m-smoe, recovered", "mc-smoe, recovered"]
    assert "| mc-smoe, recovered |" in printed
    assert results[3]["bytes"] < results[2]["bytes"] == results[1]["bytes"] < results[0]["bytes"]


@pytest.mark.slow
def test_the_lora_example_runs(tmp_path):
    printed = run("lora_on_compressed.py", "--output", str(tmp_path), "--steps", "2", "--eval-rows", "4")
    assert "the same from disk: True" in printed
    assert (tmp_path / "merged" / "model.safetensors").is_file()
