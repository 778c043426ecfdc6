import importlib
import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_cli import fail, succeed
from test_cli import tiny as tiny
from test_cli import tokens as tokens

from hf_mcsmoe.evaluation import harness as evaluation_harness
from hf_mcsmoe.evaluation.harness import TaskMetric, TaskResult, check_tasks, compare_tasks, run_tasks
from hf_mcsmoe.loading import load_model, load_tokenizer

DOCUMENTS = [
    {"question": f"w{first} w{second}", "choices": [f"w{first}", f"w{other} w7"], "label": label}
    for first, second, other, label in ((5, 9, 30, 0), (17, 40, 6, 1), (8, 3, 77, 0), (60, 61, 62, 1), (90, 4, 12, 0))
]
TASK = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def result(values, error=0.1):
    documents = dict(enumerate(values))
    metric = TaskMetric(sum(values) / len(values), error, documents)
    return {"quiz": TaskResult({"acc,none": metric}, len(values), 0, 1.0)}


def test_results_are_compared_document_by_document(monkeypatch):
    monkeypatch.setattr(evaluation_harness, "version", lambda name: f"{name} 9")
    found = compare_tasks(result([1.0, 0.0, 1.0, 1.0]), result([0.0, 0.0, 1.0, 0.0]))
    assert found["version"] == "lm_eval 9" and json.loads(json.dumps(found)) == found
    task = found["tasks"]["quiz"]
    assert (task["documents"], task["num_fewshot"], task["version"]) == (4, 0, 1.0)
    metric = task["metrics"]["acc,none"]
    assert (metric["value"], metric["baseline"], metric["increase"]) == (0.75, 0.25, 0.5)
    # Differences 1, 0, 0, 1: standard deviation 1 / sqrt 3, Student's quantile for 3 degrees of freedom.
    reach = 3.182446 / np.sqrt(3) / 2
    assert metric["increase_interval"] == pytest.approx({"low": 0.5 - reach, "high": 1.0}, rel=1e-5)
    assert 0 <= metric["interval"]["low"] < 0.75 < metric["interval"]["high"] == 1.0


def test_metrics_that_are_no_means_have_the_interval_of_the_harness(monkeypatch):
    monkeypatch.setattr(evaluation_harness, "version", lambda _: "9")
    perplexity = {"quiz": TaskResult({"word_perplexity,none": TaskMetric(20.0, 2.0, None)}, 3, 0, 1.0)}
    bare = {"quiz": TaskResult({"word_perplexity,none": TaskMetric(18.0, None, None)}, 3, 0, 1.0)}
    metric = compare_tasks(perplexity, bare)["tasks"]["quiz"]["metrics"]["word_perplexity,none"]
    assert metric["interval"] == pytest.approx({"low": 20 - 3.919928, "high": 20 + 3.919928}, rel=1e-6)
    assert (metric["increase"], metric["increase_interval"]) == (2.0, None)
    metric = compare_tasks(bare)["tasks"]["quiz"]["metrics"]["word_perplexity,none"]
    assert [metric[name] for name in ("interval", "baseline", "increase")] == [None] * 3


def test_documents_count_only_where_their_mean_is_the_metric():
    samples = [{"doc_id": n, "filter": "none", "acc": v, "f1": (1, 0)} for n, v in enumerate([1.0, 0.0, 1.0])]
    samples += [{"doc_id": 0, "filter": "strict", "acc": 0.0}]
    values = {
        "alias": "quiz",
        "sample_len": 3,
        "acc,none": 2 / 3,
        "acc_stderr,none": 0.3,
        "acc,strict": 0.0,
        "acc_stderr,strict": "N/A",
        "f1,none": 0.5,
    }
    found = evaluation_harness._metrics(values, samples)
    assert list(found) == ["acc,none", "acc,strict", "f1,none"]
    assert found["acc,none"].value_of_document == {0: 1.0, 1: 0.0, 2: 1.0} and found["acc,none"].standard_error == 0.3
    assert found["acc,strict"].value_of_document == {0: 0.0} and found["acc,strict"].standard_error is None
    assert found["f1,none"].value_of_document is None
    assert evaluation_harness._metrics(values | {"acc,none": 0.6}, samples)["acc,none"].value_of_document is None


def test_without_the_harness_the_remedy_is_named(monkeypatch, tiny, tokens):
    monkeypatch.setattr(evaluation_harness, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match=r"Install it: pip install 'hf-mcsmoe\[lm-eval\]'"):
        check_tasks(["anything"])
    fail("lm-eval is not installed", "evaluate", tiny, "--data", tokens, "--lm-eval", "anything")


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """A folder with one small task; the test is skipped without the harness, which takes seconds to import."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install 'hf-mcsmoe[lm-eval]'")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    (folder / "quiz.yaml").write_text(TASK.format(file=folder / "quiz.jsonl"))
    return folder


def choice(model, tokenizer, document):
    """Which answer is likelier after the question, as the harness asks."""
    scores = []
    for answer in document["choices"]:
        context, whole = (
            tokenizer(text)["input_ids"] for text in (document["question"], f"{document['question']} {answer}")
        )
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        places = range(len(context), len(whole))
        scores.append(sum(float(log_p[place - 1, whole[place]]) for place in places))
    return scores.index(max(scores))


def test_the_harness_gives_what_the_likelihoods_say(harness, tiny):
    model, tokenizer = load_model(tiny).train(), load_tokenizer(tiny)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = run_tasks(model, tokenizer, ["tiny_choice"], include=harness, batch_size=2)
    assert model.training and random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
    model.eval()
    expected = {n: float(choice(model, tokenizer, row) == row["label"]) for n, row in enumerate(DOCUMENTS)}
    assert 0 < sum(expected.values()) < len(expected)
    metric = found["tiny_choice"].metrics["acc,none"]
    assert metric.value_of_document == expected
    assert metric.standard_error == pytest.approx(np.std(list(expected.values()), ddof=1) / np.sqrt(5))
    assert (found["tiny_choice"].documents, found["tiny_choice"].num_fewshot) == (5, 0)


def test_evaluate_runs_tasks_on_both_models(harness, tiny, tokens):
    options = ("--lm-eval", "tiny_choice", "--lm-eval-include", harness, "--num-samples", 2, "--generations", 0)
    values = json.loads(succeed("evaluate", tiny, "--baseline", tiny, "--data", tokens, *options, "--json"))
    metric = values["lm_eval"]["tasks"]["tiny_choice"]["metrics"]["acc,none"]
    assert metric["value"] == metric["baseline"] and metric["increase"] == 0.0
    assert values["generation"] is None and "lm_eval" in sys.modules
    fail(
        "lm-eval knows no task 'tiny_quiz'",
        "evaluate",
        tiny,
        "--data",
        tokens,
        "--lm-eval",
        "tiny_quiz",
        *options[2:4],
    )
    fail(
        "There is no folder", "evaluate", tiny, "--data", tokens, "--lm-eval", "a", "--lm-eval-include", harness / "no"
    )


def test_tasks_need_a_tokenizer(harness, tiny):
    assert harness
    with pytest.raises(ValueError, match="there is no tokenizer"):
        run_tasks(load_model(tiny), None, ["tiny_choice"])


def test_one_result_may_miss_in_the_baseline(monkeypatch):
    monkeypatch.setattr(evaluation_harness, "version", lambda _: "9")
    ((name, one),) = result([1.0, 0.0]).items()
    assert (
        compare_tasks({name: one}, {name: replace(one, metrics={})})["tasks"]["quiz"]["metrics"]["acc,none"][
            "increase"
        ]
        is None
    )
