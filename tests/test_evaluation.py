import json
import logging
import math
import warnings
from logging.handlers import BufferingHandler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from hf_mcsmoe.calibration import Calibration, CalibrationBatch
from hf_mcsmoe.evaluation import (
    DomainScore,
    Evaluation,
    evaluate_model,
    generate_samples,
    repetition,
)
from hf_mcsmoe.evaluation.intervals import ratio_of_sums

VOCABULARY = 160


def batch_of(rows, *, left=False, held_out=False, pad=0):
    """Rows of token ids as one padded batch."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), True
    return CalibrationBatch({"input_ids": ids, "attention_mask": mask.long()}, mask, held_out)


def flat(values, prefix=""):
    """Nested mappings as one."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {name: value for key, part in values.items() for name, value in flat(part, f"{prefix}.{key}").items()}


def random_rows(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def reference_losses(model, row):
    """Loss of every token of one row without padding, predicted from the tokens before it, one by one."""
    losses = []
    for end in range(1, len(row)):
        with torch.no_grad():
            logits = model(torch.tensor([row[:end]])).logits[0, -1].double()
        losses.append(float(logits.logsumexp(0) - logits[row[end]]))
    return losses


class TableModel(nn.Module):
    """Takes the logits of a token from a table, (V, V): row t predicts what follows token t."""

    def __init__(self, table, head=True, is_encoder_decoder=False):
        super().__init__()
        self.embedding = nn.Embedding(*table.shape)
        self.table = table
        self.head = nn.Linear(1, 1) if head else None
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        del attention_mask, use_cache
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def baseline():
    return tiny_model("qwen3_moe", seed=1)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_loss_is_that_of_a_token_by_token_loop_whatever_the_padding(model, left):
    rows = random_rows(7, 12, 3, 1)
    batches = (batch_of(rows[:2], left=left), batch_of(rows[2:], left=left, held_out=True))
    result = evaluate_model(model, {"text": Calibration(batches, "rows")}, progress=False)

    losses = [reference_losses(model, row) for row in rows]
    total = sum(map(sum, losses))
    score = result.domains["text"]
    assert score.tokens == 6 + 11 + 2
    assert score.loss == pytest.approx(total / 19, rel=1e-5)
    assert score.perplexity == math.exp(score.loss)
    assert (score.baseline_loss, score.kl, score.top1_agreement) == (None, None, None)


def test_padding_in_the_middle_is_neither_target_nor_context():
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    batch = CalibrationBatch(
        {"input_ids": torch.tensor([[1, 2, 0, 3, 4, 1]]), "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])},
        torch.tensor([[1, 1, 0, 1, 1, 1]]).bool(),
        held_out=False,
    )
    score = evaluate_model(TableModel(table), {"a": Calibration((batch,), "")}, progress=False).overall
    log_p = table.log_softmax(-1)
    assert score.tokens == 3  # 2 after 1, 4 after 3, 1 after 4
    assert score.loss == pytest.approx(-float(log_p[1, 2] + log_p[3, 4] + log_p[4, 1]) / 3)


def test_logits_at_padding_do_not_reach_the_scores():
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    table[0] = torch.nan  # token 0 is the padding
    data = {"a": Calibration((batch_of([[1, 2, 3], [4, 2]]),), "")}
    score = evaluate_model(TableModel(table), data, baseline=TableModel(table), progress=False).overall
    log_p = table.log_softmax(-1)
    assert score.loss == pytest.approx(-float(log_p[1, 2] + log_p[2, 3] + log_p[4, 2]) / 3)


def test_kl_and_agreement_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    table, base = torch.randn(2, 6, 6, generator=generator).unbind()
    rows = random_rows(9, 4)
    rows = [[token % 6 for token in row] for row in rows]
    data = {"a": Calibration((batch_of(rows),), "")}
    score = evaluate_model(TableModel(table), data, baseline=TableModel(base), progress=False).overall

    context = torch.tensor(rows[0][:-1] + rows[1][:-1])
    target = torch.tensor(rows[0][1:] + rows[1][1:])
    kl = nn.functional.kl_div(
        table[context].log_softmax(-1), base[context].log_softmax(-1), reduction="batchmean", log_target=True
    )
    agreement = (table[context].argmax(-1) == base[context].argmax(-1)).double().mean()
    assert 0 < agreement < 1
    assert score.kl == pytest.approx(float(kl), rel=1e-5)
    assert score.top1_agreement == pytest.approx(float(agreement))
    assert score.loss == pytest.approx(float(nn.functional.cross_entropy(table[context], target)), rel=1e-5)
    assert score.baseline_loss == pytest.approx(float(nn.functional.cross_entropy(base[context], target)), rel=1e-5)


def test_tokens_that_both_models_rule_out_add_nothing_to_kl():
    table = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]])
    base = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, -torch.inf], [0.0, 0.0, 0.0]])
    data = {"a": Calibration((batch_of([[0, 1, 0]], pad=2),), "")}
    score = evaluate_model(TableModel(table), data, baseline=TableModel(base), progress=False).overall
    p = torch.tensor([0.0, 1.0]).softmax(0)  # the second context is the same for both, so it adds 0
    assert score.kl == pytest.approx(float((p * (p / 0.5).log()).sum()) / 2)


def test_a_model_is_at_no_distance_from_itself(model):
    data = {"a": Calibration((batch_of(random_rows(9, 5)),), "")}
    score = evaluate_model(model, data, baseline=model, progress=False).overall
    assert (score.kl, score.top1_agreement) == (0.0, 1.0)
    assert score.loss == score.baseline_loss


def test_chunks_and_batches_do_not_change_the_scores(model, baseline):
    data = {
        "a": Calibration((batch_of(random_rows(9, 5, 7)),), ""),
        "b": Calibration((batch_of(random_rows(4, 8)),), ""),
    }
    whole = evaluate_model(model, data, baseline=baseline, progress=False).to_dict()
    for sizes in ({"chunk_tokens": 1}, {"chunk_tokens": 4}, {"chunk_tokens": 4, "batch_size": 2}, {"batch_size": 1}):
        parts = evaluate_model(model, data, baseline=baseline, progress=False, **sizes).to_dict()
        for name, score in [*whole["domains"].items(), ("overall", whole["overall"])]:
            part = parts["overall"] if name == "overall" else parts["domains"][name]
            assert flat(part) == pytest.approx(flat(score), rel=1e-5), (sizes, name)


def test_the_default_chunk_follows_the_vocabulary(model, monkeypatch):
    seen = []
    monkeypatch.setattr("hf_mcsmoe.evaluation.scoring.CHUNK_ELEMENTS", 3 * VOCABULARY)
    monkeypatch.setattr(
        "hf_mcsmoe.evaluation.scoring._score_tokens",
        lambda target, logits: seen.append(len(logits)) or torch.zeros(1, len(target)),
    )
    evaluate_model(model, {"a": Calibration((batch_of(random_rows(9)),), "")}, progress=False)
    assert seen == [3, 3, 2]


def test_domains_are_apart_and_overall_weighs_them_by_tokens(model, baseline):
    rows = {"code": random_rows(9, 5), "prose": random_rows(4, 3, 3, seed=1)}
    data = {name: Calibration((batch_of(part),), f"{name} rows") for name, part in rows.items()}
    result = evaluate_model(model, data, baseline=baseline, progress=False)
    code, prose, overall = result.domains["code"], result.domains["prose"], result.overall
    assert list(result.domains) == ["code", "prose"]
    assert result.sources == {"code": "code rows", "prose": "prose rows"}
    assert (code.tokens, prose.tokens, overall.tokens) == (12, 7, 19)
    for name in ("loss", "baseline_loss", "kl", "top1_agreement"):
        expected = (12 * getattr(code, name) + 7 * getattr(prose, name)) / 19
        assert getattr(overall, name) == pytest.approx(expected)
    # Domains are strata: the errors of independent sums add in squares.
    expected = math.sqrt((12 * code.loss_standard_error) ** 2 + (7 * prose.loss_standard_error) ** 2) / 19
    assert overall.loss_standard_error == pytest.approx(expected)


def test_standard_error_clusters_tokens_by_row():
    # Token 1 costs -log 0.5 after any token, token 2 costs -log 0.25, token 0 the same.
    table = torch.tensor([0.25, 0.5, 0.25]).log().expand(3, 3)
    rows = [[0, 1, 1], [0, 2, 2, 2, 2], [0, 1]]
    score = evaluate_model(
        TableModel(table), {"a": Calibration((batch_of(rows[:1]), batch_of(rows[1:])), "")}, progress=False
    ).overall
    # Sums 2 b, 8 b, 1 b for b = log 2; 7 tokens; loss 11 b / 7. Residuals (2 - 22/7, 8 - 44/7, 1 - 11/7) b.
    b = math.log(2)
    residuals = [-8 / 7 * b, 12 / 7 * b, -4 / 7 * b]
    assert score.loss == pytest.approx(11 * b / 7)
    assert score.loss_standard_error == pytest.approx(math.sqrt(1.5 * sum(r * r for r in residuals)) / 7)


def test_standard_error_of_equal_rows_is_that_of_their_means(model):
    rows = random_rows(6, 6, 6, 6, 1)  # the last one predicts nothing, so it does not count
    score = evaluate_model(model, {"a": Calibration((batch_of(rows),), "")}, progress=False).overall
    means = torch.tensor([sum(losses) / 5 for losses in (reference_losses(model, row) for row in rows[:4])])
    assert score.loss_standard_error == pytest.approx(float(means.std() / 2), rel=1e-4)


def test_one_row_has_no_standard_error(model):
    data = {"a": Calibration((batch_of(random_rows(6, 1)),), ""), "b": Calibration((batch_of(random_rows(6, 4)),), "")}
    result = evaluate_model(model, data, progress=False)
    assert result.domains["a"].loss_standard_error is None
    assert result.domains["b"].loss_standard_error > 0
    assert result.overall.loss_standard_error is None


def test_intervals_are_those_of_the_rows_and_the_increase_is_paired(model, baseline):
    rows = random_rows(6, 9, 4, 12)
    score = evaluate_model(model, {"a": Calibration((batch_of(rows),), "")}, baseline=baseline, progress=False).overall
    losses, others = ([reference_losses(one, row) for row in rows] for one in (model, baseline))
    counts = np.array([len(row) for row in losses])
    sums, other_sums = (np.array([sum(row) for row in part]) for part in (losses, others))
    for interval, values, value in (
        (score.loss_interval, sums, score.loss),
        (score.loss_increase_interval, sums - other_sums, score.loss_increase),
    ):
        expected = ratio_of_sums(values, counts)
        assert value == pytest.approx(expected.value, rel=1e-4)
        assert (interval.low, interval.high) == pytest.approx(
            (expected.interval().low, expected.interval().high), rel=1e-3
        )
    assert score.perplexity_interval.low == pytest.approx(math.exp(score.loss_interval.low))
    assert score.baseline_perplexity == pytest.approx(math.exp(score.baseline_loss))
    assert score.rows == 4 and score.loss_increase == pytest.approx(score.loss - score.baseline_loss)
    assert 0 <= score.kl_interval.low < score.kl < score.kl_interval.high
    assert 0 <= score.top1_agreement_interval.low <= score.top1_agreement <= score.top1_agreement_interval.high <= 1


def test_a_baseline_is_named_without_its_folders(tmp_path):
    class Named(TableModel):
        def __init__(self):
            super().__init__(torch.zeros(5, 5))
            self.config.name_or_path = str(tmp_path / "secret" / "base")

    data = {"a": Calibration((batch_of([[1, 2, 3]]),), "")}
    scores = evaluate_model(TableModel(torch.zeros(5, 5)), data, baseline=Named(), progress=False)
    assert scores.baseline == "./base" and scores.kl_top_k is None


def test_every_submodule_gets_its_mode_back():
    model = tiny_model("qwen3_moe").train()
    model.lm_head.eval()
    seen = []
    model.model.norm.register_forward_hook(lambda module, *_: seen.append(module.training))
    data = {"a": Calibration((batch_of(random_rows(6)),), "")}
    evaluate_model(model, data, progress=False)
    assert seen == [False]
    assert model.training and model.model.norm.training and not model.lm_head.training

    broken = {"a": Calibration((batch_of([[VOCABULARY + 1, 3]]),), "")}
    with pytest.raises(IndexError):
        evaluate_model(model, broken, progress=False)
    assert model.training and not model.lm_head.training


def test_labels_are_not_given_to_the_model():
    batch = batch_of([[1, 2, 3]])
    batch.inputs["labels"] = batch.inputs["input_ids"]
    score = evaluate_model(TableModel(torch.zeros(5, 5)), {"a": Calibration((batch,), "")}, progress=False).overall
    assert score.loss == pytest.approx(math.log(5))


def test_half_precision_models_are_scored_in_float32():
    half = tiny_model("qwen3_moe").to(torch.bfloat16)
    rows = random_rows(9, 7)
    score = evaluate_model(half, {"a": Calibration((batch_of(rows),), "")}, progress=False).overall
    batch = batch_of(rows)
    with torch.no_grad():
        log_p = half(**batch.inputs).logits.double().log_softmax(-1)
    ids = batch.inputs["input_ids"]
    losses = [-float(log_p[r, t, ids[r, t + 1]]) for r, row in enumerate(rows) for t in range(len(row) - 1)]
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_models_that_are_no_causal_language_models_are_refused(model):
    data = {"a": Calibration((batch_of([[1, 2]]),), "")}
    table = torch.zeros(3, 3)
    with pytest.raises(TypeError, match=r"Only causal .* got SwitchTransformersForCond\w+, an encoder-decoder"):
        evaluate_model(tiny_model("switch_transformers"), data)
    with pytest.raises(TypeError, match="got TableModel, a model without a language-model head"):
        evaluate_model(model, data, baseline=TableModel(table, head=False))


def test_bad_values_are_refused(model):
    data = {"a": Calibration((batch_of(random_rows(6, 4)),), "")}
    table = TableModel(torch.zeros(VOCABULARY, VOCABULARY))
    with pytest.raises(ValueError, match="data_by_domain is empty"):
        evaluate_model(model, {})
    with pytest.raises(ValueError, match="batch_size is 0, it must be at least 1"):
        evaluate_model(model, data, batch_size=0)
    with pytest.raises(ValueError, match="chunk_tokens is -1"):
        evaluate_model(model, data, chunk_tokens=-1)
    with pytest.raises(ValueError, match="Domain 'short' has no token to predict"):
        evaluate_model(model, {"short": Calibration((batch_of([[3], [4]]),), "")}, progress=False)
    with pytest.raises(ValueError, match="160 tokens in its vocabulary, the baseline 161"):
        larger = TableModel(torch.zeros(VOCABULARY + 1, VOCABULARY + 1))
        evaluate_model(table, data, baseline=larger, progress=False)
    with pytest.raises(ValueError, match="scores of domain 'a' are not finite"):
        evaluate_model(TableModel(torch.full((VOCABULARY, VOCABULARY), torch.nan)), data, progress=False)

    odd = batch_of(random_rows(6, 4))
    odd.inputs["pixel_values"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"2 rows cannot be split to batch_size 1: \['pixel_values'\]"):
        evaluate_model(model, {"a": Calibration((odd,), "")}, batch_size=1, progress=False)
    with pytest.raises(ValueError, match=r"gave logits for \(2, 5\) tokens, the batch has \(2, 6\)"):
        table.forward = lambda **_: SimpleNamespace(logits=torch.zeros(2, 5, VOCABULARY))
        evaluate_model(table, data, progress=False)


def test_an_evaluation_is_plain_json():
    score = DomainScore(3, 1.5, None, math.exp(1.5))
    values = Evaluation({"a": score}, score, {"a": "file a.txt"}).to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["domains"]["a"]["loss"] == 1.5


class WordTokenizer:
    """One token a word: its number. Word 2 ends a text."""

    eos_token_id, pad_token_id, chat_template = 2, None, None

    def __call__(self, text, return_tensors=None, **_):
        ids = [int(word) for word in text.split()]
        if return_tensors is None:
            return {"input_ids": ids}
        ids = torch.tensor([ids], dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(token) for token in ids.tolist() if not (skip_special_tokens and token == 2))


def test_samples_are_the_greedy_continuations(model, monkeypatch):
    model.generation_config.update(do_sample=True, temperature=0.3, top_p=0.5)
    model.generation_config.pad_token_id = None
    handler = BufferingHandler(100)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = generate_samples(model, WordTokenizer(), ["5 9 17", "30"], max_new_tokens=6)
    assert [record.getMessage() for record in handler.buffer] == []
    for prompt, sample in zip(([5, 9, 17], [30]), samples, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and ids[-1] != 2:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert sample == " ".join(str(token) for token in ids[len(prompt) :] if token != 2)


def test_bad_prompts_are_refused(model):
    with pytest.raises(TypeError, match="prompts is a single string, '5 9'"):
        generate_samples(model, WordTokenizer(), "5 9")
    with pytest.raises(ValueError, match="The prompt '' has no token"):
        generate_samples(model, WordTokenizer(), [""])


def test_repetition_is_the_share_of_ngrams_that_occurred_before():
    # 1 2 1 2 1 has the bigrams 12, 21, 12, 21: two of four are new.
    assert repetition([1, 2, 1, 2, 1], n=2) == 0.5
    assert repetition("so it goes so it goes so it goes", n=3) == 1 - 3 / 7
    assert repetition("........", n=4) == 1 - 1 / 5  # marks count one by one, also without spaces
    assert repetition("all words here differ from others") == 0
    assert repetition("too short", n=4) == 0
    with pytest.raises(ValueError, match="n is 0"):
        repetition("a", n=0)


def test_a_model_that_accelerate_offloads_gives_the_same_scores(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    data = {"a": Calibration((batch_of(random_rows(9, 5)),), "")}
    expected = evaluate_model(model, data, progress=False)
    offloaded = accelerate.disk_offload(tiny_model("qwen3_moe"), tmp_path, execution_device=torch.device("cpu"))
    assert evaluate_model(offloaded, data, progress=False) == expected
