import json
from dataclasses import astuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_evaluation import TableModel, batch_of, random_rows
from tiny_models import tiny_model

from hf_mcsmoe.calibration import Calibration, CalibrationBatch
from hf_mcsmoe.evaluation import evaluate_model
from hf_mcsmoe.evaluation.cached_baseline import (
    BaselineCache,
    read_continuations,
    save_continuations,
    write_baseline_cache,
)
from hf_mcsmoe.evaluation.run import Extras, beside, evaluate_whole, one_at_a_time

VOCABULARY = 160


def ragged_data():
    """Rows of all kinds of padding, in two domains; one row is there twice."""
    twice = random_rows(6, seed=5)[0]
    middle = batch_of([[4, 5, 0, 6, 7, 8]])
    mask = torch.tensor([[True, True, False, True, True, True]])
    middle = CalibrationBatch({**middle.inputs, "attention_mask": mask.long()}, mask, held_out=False)
    return {
        "a": Calibration((batch_of(random_rows(9, 5, 7)), batch_of([*random_rows(4, seed=2), twice], left=True)), ""),
        "b": Calibration((batch_of([twice, *random_rows(8, 1, seed=3)]), middle), ""),
    }


@pytest.fixture(scope="module")
def models():
    return tiny_model("qwen3_moe"), tiny_model("qwen3_moe", seed=1)


def assert_close(scores, expected, without=()):
    for found, other in zip(
        [*scores.domains.values(), scores.overall], [*expected.domains.values(), expected.overall], strict=True
    ):
        for name, value in vars(other).items():
            if name in without:
                continue
            value, one = ([*astuple(v)] if hasattr(v, "low") else [v] for v in (value, getattr(found, name)))
            assert one == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_all_logits_give_what_the_baseline_beside_the_model_gives(models, tmp_path):
    model, baseline = models
    data = ragged_data()
    path = write_baseline_cache(baseline, data, tmp_path / "base.safetensors", top_k=999, batch_size=2, progress=False)
    expected = evaluate_model(model, data, baseline=baseline, progress=False)
    cache = BaselineCache(path, data)
    assert cache.top_k is None and cache.vocab_size == VOCABULARY
    for options in ({}, {"batch_size": 1}, {"chunk_tokens": 3}):
        scores = evaluate_model(model, data, baseline=cache, progress=False, **options)
        assert_close(scores, expected)
        assert scores.kl_top_k is None


def test_few_logits_give_a_lower_bound_of_the_divergence_and_all_else_exactly(models, tmp_path):
    model, baseline = models
    data = ragged_data()
    expected = evaluate_model(model, data, baseline=baseline, progress=False)
    bounds = []
    for top_k in (1, 8, 64):
        path = write_baseline_cache(baseline, data, tmp_path / f"{top_k}.safetensors", top_k=top_k, progress=False)
        scores = evaluate_model(model, data, baseline=BaselineCache(path, data), progress=False)
        assert scores.kl_top_k == top_k
        assert_close(scores, expected, without=("kl", "kl_interval"))
        bounds.append(scores.overall.kl)
    assert bounds == sorted(bounds) and 0 < bounds[0] and bounds[-1] < expected.overall.kl


def test_the_bound_is_that_of_k_tokens_and_one_bucket():
    generator = torch.Generator().manual_seed(0)
    table, base = torch.randn(2, 6, 6, generator=generator).unbind()
    data = {"a": Calibration((batch_of([[0, 1, 2, 3]]),), "")}

    class Cached:
        """The two likeliest tokens of each row of a table."""

        name, top_k, vocab_size = "table", 2, 6

        def tokens(self, batch, row, position):
            from hf_mcsmoe.evaluation.cached_baseline import CachedTokens

            ids = batch.inputs["input_ids"]
            log_p = base[ids[row, position]].log_softmax(-1)
            top = log_p.topk(2)
            rest = (1 - top.values.exp().sum(-1, keepdim=True)).log()
            target = log_p.gather(-1, ids[row, position + 1][:, None]).squeeze(-1)
            return CachedTokens(top.indices.int(), torch.cat([top.values, rest], -1), target)

    scores = evaluate_model(TableModel(table), data, baseline=Cached(), progress=False)
    expected = 0.0
    for token in (0, 1, 2):
        p, q = base[token].softmax(0), table[token].softmax(0)
        top = p.topk(2).indices
        p_all, q_all = (torch.cat([x[top], (1 - x[top].sum())[None]]) for x in (p, q))
        expected += float((p_all * (p_all / q_all).log()).sum()) / 3
    assert scores.overall.kl == pytest.approx(expected, rel=1e-4)
    assert (scores.baseline, scores.kl_top_k) == ("table", 2)


def test_other_rows_and_other_files_are_refused(models, tmp_path):
    _, baseline = models
    data = ragged_data()
    path = write_baseline_cache(baseline, {"a": data["a"]}, tmp_path / "base.safetensors", top_k=4, progress=False)
    BaselineCache(path, {"renamed": data["a"]})
    with pytest.raises(ValueError, match=r"made for other data: 3 of 9 rows of this evaluation are not among its 5"):
        BaselineCache(path, data)
    with pytest.raises(FileNotFoundError, match="There is no file of cached logits"):
        BaselineCache(tmp_path / "none.safetensors", data)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    warm = tmp_path / "warm.safetensors"
    save_file(tensors, warm, {**metadata, "temperature": json.dumps(2.0)})
    with pytest.raises(ValueError, match=r"at temperature 2\.0; an evaluation needs 'causal' at 1\.0"):
        BaselineCache(warm, {"a": data["a"]})
    del tensors["target_log_prob"]
    old = tmp_path / "old.safetensors"
    save_file(tensors, old, {**metadata, "format_version": "1"})
    with pytest.raises(ValueError, match="with the probabilities of the targets"):
        BaselineCache(old, {"a": data["a"]})
    larger = TableModel(torch.zeros(VOCABULARY + 1, VOCABULARY + 1))
    with pytest.raises(ValueError, match="161 tokens in its vocabulary, the baseline 160"):
        evaluate_model(larger, {"a": data["a"]}, baseline=BaselineCache(path, data | {"b": data["a"]}), progress=False)


def test_continuations_are_kept_for_the_same_prompts(tmp_path):
    cache, prompts = tmp_path / "base.safetensors", [[1, 2], [3]]
    assert read_continuations(cache, prompts, 8) is None
    save_continuations(cache, prompts, 8, [[4], [5, 6]])
    assert read_continuations(cache, prompts, 8) == [[4], [5, 6]]
    assert read_continuations(cache, prompts, 9) is None and read_continuations(cache, [[1, 2]], 8) is None


def test_one_at_a_time_is_the_same_evaluation_and_loads_the_baseline_once(models, tmp_path):
    model, baseline = models
    data, loaded = ragged_data(), []
    extras = Extras(prompts=[[5, 9, 17], [30]], prompt_source="two", max_new_tokens=5)

    def load(one=baseline):
        loaded.append(one)
        return one

    expected, _ = evaluate_whole(lambda: model, data, extras, beside(lambda: baseline, extras), progress=False)
    cache = tmp_path / "base.safetensors"
    first = one_at_a_time(load, cache, data, extras, progress=False)
    second = one_at_a_time(load, cache, data, extras, progress=False)
    third = one_at_a_time(None, cache, data, extras, progress=False)
    assert loaded == [baseline]
    for found in (first, second, third):
        scores, measured = evaluate_whole(lambda: model, data, extras, found, progress=False)
        assert_close(scores, expected, without=("kl", "kl_interval"))
        assert scores.generation == expected.generation and len(measured.written) == 2
        assert scores.generation.same_prefix is not None and scores.kl_top_k == 128

    longer = Extras(prompts=extras.prompts, max_new_tokens=6)  # not kept: asked again, or left out
    assert one_at_a_time(None, cache, data, longer, progress=False).measured.written is None
    assert one_at_a_time(load, cache, data, longer, progress=False).measured.written is not None
    assert loaded == [baseline, baseline]
    with pytest.raises(FileNotFoundError, match="There is no file of cached logits"):
        one_at_a_time(None, tmp_path / "none.safetensors", data, extras)


def test_a_model_that_is_no_causal_language_model_is_refused_before_it_writes():
    extras = Extras(prompts=[[5, 9]])
    other = tiny_model("switch_transformers")
    with pytest.raises(TypeError, match="Only causal language models"):
        beside(lambda: other, extras)


def test_a_model_that_cannot_write_is_only_scored():
    model = tiny_model("qwen3_moe")
    model.can_generate = lambda: False
    data = {"a": ragged_data()["a"]}
    scores, measured = evaluate_whole(lambda: model, data, Extras(prompts=[[5, 9]]), progress=False)
    assert scores.generation is None and measured.written is None and scores.overall.loss > 0
