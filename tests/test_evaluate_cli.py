import json

import pytest
from test_cli import compressed as compressed
from test_cli import fail, succeed
from test_cli import tiny as tiny
from test_cli import tokens as tokens


@pytest.fixture(scope="module")
def beside(tiny, tokens, compressed):
    """Scores with both models in memory."""
    return json.loads(succeed("evaluate", compressed[0], "--baseline", tiny, "--data", tokens, "--json"))


@pytest.mark.slow
def test_one_model_at_a_time_gives_the_same_scores(tiny, tokens, compressed, beside, tmp_path):
    folder, cache = compressed[0], tmp_path / "base.safetensors"
    options = ("--data", tokens, "--baseline-cache", cache, "--json")
    first = json.loads(succeed("evaluate", folder, "--baseline", tiny, *options))
    second = json.loads(succeed("evaluate", folder, *options))
    assert cache.is_file() and (tmp_path / "base.generations.json").is_file()
    assert first == second
    assert (beside["kl_top_k"], first["kl_top_k"]) == (None, 128) and first["baseline"] == f"./{tiny.name}"
    for name in ("loss", "baseline_loss", "loss_increase", "top1_agreement"):
        assert first["overall"][name] == pytest.approx(beside["overall"][name], rel=1e-5)
    assert 0 < first["overall"]["kl"] <= beside["overall"]["kl"]
    assert first["generation"] == beside["generation"]
    assert "128 likeliest tokens and all others as one outcome, a lower bound" in succeed(
        "evaluate", folder, *options[:4]
    )


@pytest.mark.slow
def test_a_cache_of_something_else_is_refused(tiny, tokens, compressed, tmp_path):
    cache = tmp_path / "base.safetensors"
    options = ("--baseline-cache", cache, "--num-samples", 4)
    fail("There is no file of cached logits", "evaluate", tiny, "--data", tokens, *options)
    succeed("evaluate", tiny, "--baseline", tiny, "--data", tokens, *options)
    fail("made for other data: 20 of 24", "evaluate", tiny, "--data", tokens, *options[:2])
    fail("is of '.*tiny', not of '.*half'", "evaluate", tiny, "--baseline", compressed[0], "--data", tokens, *options)


def test_the_models_write_beside_a_baseline_unless_told_otherwise(tiny, tokens, beside):
    check = beside["generation"]
    assert check["prompts"] == 16 and check["max_new_tokens"] == 64
    assert "beginnings of rows of the evaluation text" in check["prompt_source"]
    text = succeed("evaluate", tiny, "--baseline", tiny, "--data", tokens, "--num-samples", 3, "--max-new-tokens", 4)
    for part in ("repeated 4-grams", "ended by itself", "begins as the baseline's", "prompts: 3"):
        assert part in text
    alone = ("evaluate", tiny, "--data", tokens, "--num-samples", 2, "--json")
    assert json.loads(succeed(*alone))["generation"] is None
    check = json.loads(succeed(*alone, "--generations", 1, "--max-new-tokens", 2))["generation"]
    assert check["prompts"] == 1 and check["same_prefix"] is None and check["repetition"]["baseline"] is None
    off = json.loads(succeed(*alone, "--baseline", tiny, "--generations", 0))
    assert off["generation"] is None
    fail("must be at least 0 and 1", "evaluate", tiny, "--data", tokens, "--generations", -1)
    fail("must be at least 0 and 1", "evaluate", tiny, "--data", tokens, "--max-new-tokens", 0)


def test_saved_scores_hold_intervals_and_the_check(tiny, tokens, compressed):
    folder = compressed[0]
    succeed("evaluate", folder, "--baseline", tiny, "--data", tokens, "--save", "--max-new-tokens", 8)
    found = json.loads((folder / "compression_report.json").read_text())["evaluation"]
    overall = found["overall"]
    assert overall["kl_interval"]["low"] < overall["kl"] < overall["kl_interval"]["high"]
    assert found["confidence"] == 0.95 and found["generation"]["repetition"]["increase"]["value"] is not None
    assert str(tiny.parent) not in json.dumps(found)
