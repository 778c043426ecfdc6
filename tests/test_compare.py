"""One calibration for all: the results are those of each method alone, and an interrupted comparison goes on."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hf_mcsmoe import load_calibration
from hf_mcsmoe.cli import app
from hf_mcsmoe.compare import compare_methods, recipes_to_compare
from hf_mcsmoe.compare_tables import comparison_table, plot_comparison
from hf_mcsmoe.evaluation import evaluate_model
from hf_mcsmoe.evaluation.baseline_logits import BaselineLogits
from hf_mcsmoe.executors import in_memory
from hf_mcsmoe.presets import PRESETS

METHODS = ["m-smoe", "reap", "joint-obs"]
FAST = METHODS[:2]


@pytest.fixture
def judged(tokens):
    return {"first": load_calibration(tokens[:5]), "second": load_calibration(tokens[5:9])}


@pytest.mark.slow
def test_results_are_those_of_each_method_alone(original, compress, tokens, judged):
    model = original("qwen3_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipes = [*recipes_to_compare(FAST, [0.75, 0.5]), *recipes_to_compare(METHODS[2:], [0.5])]
    results = compare_methods(model, recipes, load_calibration(tokens), judged, progress=False)
    assert [(x.method, x.layout, x.keep) for x in results] == [
        *((name, PRESETS[name].recipe.get("layout", "mapped"), keep) for name in FAST for keep in (0.75, 0.5)),
        ("joint-obs", "mapped", 0.5),
    ]
    for result in results:
        alone = compress("qwen3_moe", preset=result.method, keep=result.keep)
        assert result.total_bytes == alone.compression_report.total_bytes_after
        expected = evaluate_model(alone, judged, baseline=model, progress=False)
        assert result.evaluation == expected.to_dict()
        assert result.loss_increase == expected.overall.loss - expected.overall.baseline_loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_calibration_data_runs_once_for_all_methods(original, tokens, judged, monkeypatch):
    forwards = []
    whole = in_memory.collect
    counting = lambda *args, **how: forwards.append(how) or whole(*args, **how)  # noqa: E731
    monkeypatch.setattr("hf_mcsmoe.executors.kept_inputs.collect", counting)
    compare_methods(
        original("mixtral"), recipes_to_compare(METHODS, [0.5]), load_calibration(tokens), judged, progress=False
    )
    assert len(forwards) == 1
    sequential = recipes_to_compare(["joint-obs"], [0.5], sequential=True)
    compare_methods(original("mixtral"), sequential, load_calibration(tokens), judged, progress=False)
    assert len(forwards) == 1 + 1 + 3  # one for the budget, one a layer


def test_methods_that_read_gradients_and_those_that_keep_tokens_share_a_run(original, compress, tokens, judged):
    recipes = recipes_to_compare(["heapr", "joint-obs"], [0.5])
    results = compare_methods(original("qwen3_moe"), recipes, load_calibration(tokens), judged, progress=False)
    for result in results:
        alone = compress("qwen3_moe", preset=result.method)
        losses = evaluate_model(alone, judged, progress=False).overall.loss, result.evaluation["overall"]["loss"]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), result.method


def test_what_a_model_cannot_have_is_skipped_with_the_reason(original, tokens, judged):
    recipes = recipes_to_compare(["reap", "m-smoe"], [0.5, 0.125])
    results = compare_methods(original("qwen3_moe"), recipes, load_calibration(tokens), judged, progress=False)
    assert [x.skipped is None for x in results] == [True, False, True, True]  # fewer experts than the top-k
    assert "picks 2 of 8 experts" in results[1].skipped and results[1].evaluation is None
    table = comparison_table(results)
    assert table.count("\n| ") == 4 and f"Not done: reap, native, 12%: {results[1].skipped}" in table


def test_recipes_are_those_of_the_layouts_that_a_preset_has_each_once():
    both = recipes_to_compare(["mc-smoe", "narrow-obs", "joint-obs", "reap"], [0.5], ["mapped", "native"])
    names = [(recipe.preset, recipe.layout) for recipe in both]
    assert names == [
        ("mc-smoe", "mapped"),
        ("narrow-obs", "mapped"),  # the same as joint-obs
        ("narrow-obs", "native"),
        ("reap", "mapped"),
        ("reap", "native"),
    ]
    with pytest.raises(ValueError, match=r"'mc-smoe' has the layouts \['mapped'\], not \['native'\]"):
        recipes_to_compare(["mc-smoe"], [0.5], ["native"])
    with pytest.raises(ValueError, match="'auto' compares methods by itself"):
        recipes_to_compare(["auto"], [0.5])
    with pytest.raises(ValueError, match=r"Unknown preset 'reep'.*Did you mean 'reap'"):
        recipes_to_compare(["reep"], [0.5])


@pytest.mark.slow
def test_the_picture_shows_every_result(original, tokens, judged, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    results = compare_methods(
        original("mixtral"), recipes_to_compare(FAST, [0.75, 0.5]), load_calibration(tokens), judged, progress=False
    )
    drawn = {}
    draw = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda s, x, y, **k: drawn.update({k["label"]: (x, y)}) or draw(s, x, y, **k))
    plot_comparison(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    for result in results:
        x, y = drawn[f"{result.method}, {result.layout}"]
        assert x == sorted(x)
        assert y[x.index(result.expert_bytes / 1e6)] == result.loss_increase


def test_the_command_writes_its_files_and_goes_on_where_it_was(checkpoint, tokens, tmp_path):
    pytest.importorskip("matplotlib")
    np.save(tmp_path / "rows.npy", tokens.numpy())
    rows = str(tmp_path / "rows.npy")
    command = ["compare", str(checkpoint("qwen3_moe")), "--methods", "m-smoe,reap", "--keep", "0.5"]
    command += ["--calibration", rows, "--eval", rows, "--dtype", "float32", "--output", str(tmp_path / "out")]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "results.json",
        "table.md",
        "quality_over_bytes.png",
    }
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    results["results"][1]["seconds"] = -1.0  # to be recognised
    del results["results"][0]
    (tmp_path / "out" / "results.json").write_text(json.dumps(results))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    after = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [(x["method"], x["seconds"] == -1.0) for x in after] == [("reap", True), ("m-smoe", False)]
    other = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert other.exit_code == 2


def test_the_original_predicts_each_text_once_for_all_methods(original, compress, judged):
    model, compressed = original("qwen3_moe"), compress("qwen3_moe", preset="reap", keep=0.5)
    size = sum(model(**batch.inputs).logits.nbytes for batch in judged["first"].batches)
    for memory, expected in ((0, 2), (size, 1)):  # without room, and with room for the first domain only
        runs = []
        hook = model.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        baseline = BaselineLogits(model, memory)
        first, again = (evaluate_model(compressed, judged, baseline=baseline, progress=False) for _ in range(2))
        hook.remove()
        once, every_time = len(judged["first"].batches), len(judged["second"].batches)
        assert len(runs) == expected * once + 2 * every_time
        assert first == again == evaluate_model(compressed, judged, baseline=model, progress=False)
