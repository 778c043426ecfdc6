"""PreMoe: scores of tasks from the router alone, a store of patterns, and loading the experts of one of them only."""

import json

import pytest
import torch
from slow_moe import MODELS, STUDIED, kept_by, padded, ragged_rows, slow_layers
from torch.testing import assert_close

from hf_mcsmoe import MergedSparseMoeConfig, compress_moe
from hf_mcsmoe.executors.accumulator import StatisticsAccumulator
from hf_mcsmoe.executors.shards import Shards
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.observation.observed import ObservedTokens
from hf_mcsmoe.partial_loading import load_experts
from hf_mcsmoe.task_patterns import load_task_patterns, nearest_task, save_task_patterns, task_pattern

SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "nemotron_h", "granitemoe", "gemma4_text")
]
FAMILIES = ["mixtral", "gpt_oss", "deepseek_v3", *SLOW]


def tcess(layer):
    scores = [0.0] * layer.num_experts
    for token in layer.tokens:
        first = max(range(layer.num_experts), key=lambda e: (token.logits[e].item(), -e))
        if token.logits[first] > -1:
            scores[first] += token.logits[first].item() / len(layer.tokens)
    return scores


@pytest.mark.parametrize("model_type", STUDIED)
def test_a_pattern_is_the_score_of_the_paper_and_the_preset_keeps_its_best(original, tokens, model_type, layout):
    model, rows = original(model_type, **MODELS[model_type]), ragged_rows(tokens)
    slow, pattern = slow_layers(model, rows), task_pattern(model, rows, batch_size=5)
    recipe = MergedSparseMoeConfig.from_preset("premoe", layout=layout)
    result = compress_moe(model, recipe, calibration=padded(rows), progress=False)
    for layer, report in zip(slow, result.compression_report.layers, strict=True):
        assert_close(pattern[report.layer], torch.tensor(tcess(layer), dtype=torch.float64), rtol=1e-4, atol=1e-7)
        assert report.dominant_of_group == kept_by(tcess(layer), layer.num_experts // 2)


def test_first_choices_worked_out_by_hand():
    logits = torch.tensor(
        [[2.0, 1.0, 2.0], [-3.0, -2.0, -9.0], [0.0, -0.5, -1.0], [0.0, 9.0, 0.0], [-1.0, -2.0, -0.5]]
    )
    mask = torch.tensor([True, True, True, False, True])
    index, weights = logits.topk(1).indices, torch.ones(5, 1)
    accumulator = StatisticsAccumulator(3, frozenset({"top_logit_sum"}))
    accumulator.update(ObservedTokens(3, torch.zeros(5, 2), index, weights, mask, logits))
    statistics = accumulator.finish("layer")
    assert statistics["top_logit_sum"].tolist() == [2.0, 0.0, -0.5] and statistics.num_tokens == 4
    assert statistics["top_logit_sum"].shape == (3,)


def test_a_store_gives_back_what_was_saved_and_finds_the_nearest_task(tmp_path):
    patterns = {
        "law": {"b": torch.tensor([1.0, 0.0]).double(), "a": torch.tensor([0.0, 2.0, 0.0]).double()},
        "code": {"b": torch.tensor([0.0, 3.0]).double(), "a": torch.tensor([1.0, 0.0, 0.0]).double()},
    }
    save_task_patterns(patterns, tmp_path / "store")
    loaded = load_task_patterns(tmp_path / "store")
    assert list(loaded) == ["law", "code"]
    assert all(torch.equal(loaded[task][layer], score) for task in patterns for layer, score in patterns[task].items())
    prompt = {"a": torch.tensor([0.0, 1.0, 0.0]), "b": torch.tensor([0.5, 0.5])}
    task, similarity = nearest_task(loaded, prompt)
    assert task == "law"
    assert similarity == pytest.approx((2 + 0.5) / (5**0.5 * 1.5**0.5))
    assert nearest_task(loaded, {"a": torch.zeros(3), "b": torch.zeros(2)}) == ("law", 0.0)


def test_a_prompt_is_nearest_to_its_own_task(original):
    model = original("mixtral")
    generator = torch.Generator().manual_seed(0)
    words = {"low": (3, 8), "high": (140, 145)}
    texts = {task: torch.randint(*ids, (13, 20), generator=generator) for task, ids in words.items()}
    patterns = {task: task_pattern(model, rows[:12]) for task, rows in texts.items()}
    for task, rows in texts.items():
        assert nearest_task(patterns, task_pattern(model, rows[12:]))[0] == task


def test_stores_that_do_not_fit_are_refused(tmp_path):
    one, other = {"a": torch.ones(3)}, {"a": torch.ones(4)}
    with pytest.raises(ValueError, match=r"patterns of 'x' and 'y' are of different models.*with one model"):
        save_task_patterns({"x": one, "y": other}, tmp_path)
    with pytest.raises(ValueError, match=r"no task patterns\. Make some"):
        nearest_task({}, one)
    with pytest.raises(FileNotFoundError, match=r"has no task_patterns\.json"):
        load_task_patterns(tmp_path)
    save_task_patterns({"x": one}, tmp_path)
    index = json.loads((tmp_path / "task_patterns.json").read_text())
    (tmp_path / "task_patterns.json").write_text(json.dumps({**index, "tasks": ["x", "y"]}))
    with pytest.raises(ValueError, match=r"is not what task_patterns\.json describes"):
        load_task_patterns(tmp_path)
    (tmp_path / "task_patterns.json").write_text(json.dumps({**index, "format_version": 9}))
    with pytest.raises(ValueError, match=r"format_version 9, this hf_mcsmoe reads up to 1.*Upgrade"):
        load_task_patterns(tmp_path)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_loaded_experts_are_those_of_the_whole_model_pruned(original, tokens, prompt, tmp_path, model_type, stacked):
    model = original(model_type)
    model.save_pretrained(tmp_path, max_shard_size="60KB", save_original_format=not stacked)
    pattern = task_pattern(model, tokens)
    small = load_experts(tmp_path, pattern, num_experts=6)
    expected = compress_moe(
        model,
        MergedSparseMoeConfig.from_preset("premoe", num_experts=6, keep=None),
        calibration=padded(tokens.tolist()),
        progress=False,
    )
    assert type(small) is type(expected)
    kept = [report.dominant_of_group for report in expected.compression_report.layers]
    assert list(small.loaded_experts.values()) == kept
    with torch.no_grad():
        assert torch.equal(small(input_ids=prompt).logits, expected(input_ids=prompt).logits)


def test_dropped_experts_are_not_read(original, tokens, tmp_path, monkeypatch):
    model, read = original("mixtral"), []
    model.save_pretrained(tmp_path)
    pattern, opened = task_pattern(model, tokens), Shards.opened
    monkeypatch.setattr(Shards, "opened", lambda self, names: read.extend(names) or opened(self, names))
    small = load_experts(tmp_path, pattern, keep=0.25)
    of_experts = [name for name in read if ".experts." in name]
    assert len(of_experts) == 3 * 2 * 3 and len(set(of_experts)) == len(of_experts)
    assert {layer.num_experts for layer in find_layers(small)} == {2}
    read_of_layer = {
        int(name.split(".experts.")[1].split(".")[0]) for name in of_experts if name.startswith("model.layers.1.")
    }
    assert sorted(read_of_layer) == small.loaded_experts["model.layers.1.mlp.experts"]


def test_patterns_of_another_model_are_refused(original, tokens, tmp_path):
    original("mixtral").save_pretrained(tmp_path)
    pattern = task_pattern(original("mixtral"), tokens)
    first = next(iter(pattern))
    with pytest.raises(ValueError, match=rf"The pattern has 7 scores for '{first}'.*task_pattern\(model"):
        load_experts(tmp_path, {**pattern, first: pattern[first][:7]})
    with pytest.raises(ValueError, match=rf"The pattern has no scores for '{first}'"):
        load_experts(tmp_path, {name: score for name, score in pattern.items() if name != first})
    with pytest.raises(ValueError, match=r"num_experts is 1, but in layout 'native' the router.*at least 2"):
        load_experts(tmp_path, pattern, num_experts=1)
