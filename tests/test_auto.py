import copy
import json
import logging

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_mcsmoe import MergedSparseMoeConfig, auto, compress_moe, load_calibration, plan
from hf_mcsmoe.auto_candidates import CANDIDATES, candidates, recipe_to_plan
from hf_mcsmoe.cli import app
from hf_mcsmoe.evaluation import DomainScore, Evaluation, evaluate_model
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layouts import check_layout
from hf_mcsmoe.publishing.report import read_report
from hf_mcsmoe.recipe import Recipe
from hf_mcsmoe.recipe_reading import recipe_from_dict, recipe_from_preset
from hf_mcsmoe.types import Trial

ROWS = torch.randint(3, 150, (16, 20), generator=torch.Generator().manual_seed(5))
KLS = [0.3, 0.1, 0.2, 0.4]  # of trials that are made up
PROMPT = torch.randint(3, 150, (4, 14), generator=torch.Generator().manual_seed(1))


def one_layer(**changes):
    return tiny_model("qwen3_moe", num_hidden_layers=1, **changes)


def request(**changes):
    return MergedSparseMoeConfig.from_preset("auto", **changes)


def run(model, **changes):
    return compress_moe(model, request(**changes), calibration=ROWS, progress=False)


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def labels(layout):
    return [Trial(*candidate).label for candidate in CANDIDATES[layout]]


@pytest.fixture(scope="module", autouse=True)
def _short_matching():
    """Two steps of Adam in place of hundreds, on everything that is matched."""
    with pytest.MonkeyPatch.context() as patch:
        for layout, steps in CANDIDATES.items():
            short = [
                (name, {**changes, "matching_options": {"steps": 2}} if name.endswith("-matched") else changes)
                for name, changes in steps
            ]
            patch.setitem(CANDIDATES, layout, short)
        yield


@pytest.fixture(scope="module")
def mapped():
    """A tiny model after "auto" in the mapped layout."""
    return run(one_layer(), keep=0.5)


@pytest.fixture
def divergences(monkeypatch):
    """`divergences(a, b, ...)`: trials end with these KLs from now on, one after another, without any work."""

    def give(*values):
        left = iter(values)
        monkeypatch.setattr(
            auto, "try_candidate", lambda _, one, *__: Trial(one.preset, one.changes, next(left), 0.5, 1.0)
        )

    return give


# --- which recipe wins


def test_the_recipe_of_least_divergence_on_held_out_rows_wins(mapped):
    data = load_calibration(ROWS)
    held_out = auto.held_out_rows(data)
    assert held_out.num_tokens == data.num_held_out_tokens == 20
    divergences = []
    for preset, changes in CANDIDATES["mapped"]:
        model = one_layer()
        compress_moe(model, recipe_from_preset(preset, keep=0.5, **changes), calibration=ROWS, progress=False)
        score = evaluate_model(model, {"a": held_out}, baseline=one_layer(), progress=False).overall
        divergences.append((score.kl, score.loss - score.baseline_loss))
    tried = mapped.compression_report.tried
    assert [trial.label for trial in tried] == labels("mapped")
    assert [(trial.kl, trial.loss_increase) for trial in tried] == divergences
    assert len({kl for kl, _ in divergences}) > 1
    best = min(range(len(divergences)), key=lambda place: divergences[place][0])
    assert [trial.is_chosen for trial in tried] == [place == best for place in range(len(tried))]


@pytest.mark.parametrize("best", [0, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 2, 3))])
def test_each_candidate_can_win_and_the_model_is_what_its_recipe_makes(divergences, best):
    divergences(*(0.1 if place == best else 0.2 for place in range(4)))
    model = run(one_layer(), keep=0.5, seed=3)
    preset, changes = CANDIDATES["mapped"][best]
    recipe = recipe_from_preset(preset, keep=0.5, seed=3, **changes)
    named = compress_moe(one_layer(), recipe, calibration=ROWS, progress=False)
    assert torch.equal(logits(model), logits(named))
    report = model.compression_report
    assert recipe_from_dict(report.recipe) == recipe and report.recipe["preset"] == preset
    assert model.config.merged_sparse_moe["recipe"] == recipe.to_dict()
    assert [trial.is_chosen for trial in report.tried].index(True) == best


def test_a_tie_goes_to_the_earlier_candidate(divergences):
    divergences(0.3, 0.2, 0.2, 0.4)
    tried = choose(one_layer(), lambda *_: None)[1]
    assert [trial.is_chosen for trial in tried] == [False, True, False, False]


def choose(model, compress, **changes):
    return auto.choose_recipe(model, request(**changes).to_recipe(), load_calibration(ROWS), compress, progress=False)


@pytest.mark.slow
def test_copies_are_compared_with_the_model_as_it_was(monkeypatch):
    model, kept, compared = one_layer(), [], []
    before = copy.deepcopy(model.state_dict())

    def compress(copied, recipe):
        kept.append((copied, recipe))
        copied.compressed = recipe

    def evaluate(shown, data, *, baseline, **_):
        compared.append((shown, data, baseline))
        score = DomainScore(10, 3.0, None, 20.0, 2.5, KLS[len(compared) - 1], 0.5)
        return Evaluation({"data": score}, score)

    monkeypatch.setattr(auto, "evaluate_model", evaluate)
    recipe, trials = choose(model, compress)
    assert recipe == kept[1][1]
    assert [(trial.kl, trial.loss_increase) for trial in trials] == [(kl, 0.5) for kl in KLS]
    for (copied, _), (shown, rows, baseline) in zip(kept, compared, strict=True):
        assert shown is copied and copied is not model and baseline is model
        assert rows["held out"].num_tokens == load_calibration(ROWS).num_held_out_tokens
    assert not hasattr(model, "compressed")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_the_result_is_the_same_each_time_and_draws_no_global_number(mapped):
    model = one_layer()  # draws its weights
    state = torch.get_rng_state()
    again = run(model, keep=0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(logits(again), logits(mapped))
    for one, other in zip(again.compression_report.tried, mapped.compression_report.tried, strict=True):
        assert (one.kl, one.is_chosen) == (other.kl, other.is_chosen)


# --- the native layout


@pytest.mark.slow
def test_native_results_are_plain_models_of_the_best_native_recipe():
    model = run(one_layer(), keep=0.5, layout="native")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    tried = model.compression_report.tried
    assert [trial.label for trial in tried] == labels("native") and not any(trial.skipped for trial in tried)
    best = min(tried, key=lambda trial: trial.kl)
    assert best.is_chosen and model.compression_report.recipe["preset"] == best.preset
    assert model.compression_report.recipe["layout"] == "native"


@pytest.mark.parametrize("keep, count", [(0.5, 5), (0.75, 4), (0.9, 4)])
def test_experts_are_dropped_and_narrowed_only_below_their_share(keep, count):
    found = candidates(recipe_from_preset("auto", keep=keep, layout="native"), lambda _: None)
    assert len(found) == count
    assert {(one.recipe.keep, one.recipe.layout) for one in found} == {(keep, "native")}


# --- what is skipped


def test_what_the_router_cannot_have_is_skipped_with_the_reason(divergences):
    divergences(0.3, 0.2, 0.25)
    # 8 experts, top-7: 6 experts are too few for it, 8 narrow ones are not.
    model = run(one_layer(num_experts_per_tok=7), keep=0.5, layout="native")
    tried = model.compression_report.tried
    assert [trial.skipped is None for trial in tried] == [True, True, True, False, False]
    assert all("7" in trial.skipped and trial.kl is None for trial in tried[3:])
    assert tried[1].is_chosen and model.compression_report.recipe["preset"] == "narrow-obs-matched"


@pytest.mark.slow
def test_what_only_a_trial_shows_to_be_impossible_is_skipped():
    def compress(_, recipe):
        if recipe.preset == "joint-obs":
            raise ValueError("the statistics say no")

    recipe, tried = choose(one_layer(), compress)
    assert [trial.skipped for trial in tried] == ["the statistics say no", None, None, None]
    assert recipe.preset == "joint-obs-matched" and tried[1].is_chosen and tried[1].kl == 0


@pytest.mark.parametrize("layout, preset", [("mapped", "m-smoe"), ("native", "frequency")])
def test_where_nothing_can_be_tried_the_plain_recipe_is_taken_and_said(layout, preset, monkeypatch, caplog):
    monkeypatch.setattr("hf_mcsmoe.layouts.check_forms", refuse_forms)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING"):
        model = run(one_layer(), keep=0.5, layout=layout)
    report = model.compression_report
    assert report.recipe["preset"] == preset and "refit" not in report.recipe
    assert all(trial.skipped == "no forms here" for trial in report.tried)
    assert any("could try no recipe" in line and preset in line for line in report.warnings)
    assert "could try no recipe" in caplog.text
    assert plan(one_layer(), request(layout=layout).to_recipe()).layout == layout


def refuse_forms(_):
    raise ValueError("no forms here")


# --- what is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_experts": 4, "keep": None}, r"num_experts is 4, but the preset 'auto' chooses.*Leave it out"),
        ({"refit": "least_squares"}, "refit is 'least_squares', but the preset 'auto'"),
        ({"merging": "average"}, "merging is 'average', but"),
    ],
)
def test_steps_cannot_be_set_beside_auto(changes, message):
    with pytest.raises(ValueError, match=message):
        run(one_layer(), **changes)
    with pytest.raises(ValueError, match=message):
        plan(one_layer(), request(**changes).to_recipe())


@pytest.mark.slow
def test_it_is_loaded_where_it_was_to_be_streamed_and_says_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_mcsmoe.executors.streaming_choice.logger.warning", said.append)
    one_layer().save_pretrained(tmp_path / "in")
    for executor in ("streaming", "auto", "in_memory"):
        where = {"output_dir": tmp_path / executor, "executor": executor, "progress": False}
        assert compress_moe(tmp_path / "in", "auto", calibration=ROWS, **where).compression_report.tried
    assert len(said) == 2 and all("tries recipes on copies of the whole model" in text for text in said)


def test_one_row_leaves_nothing_to_choose_by():
    with pytest.raises(ValueError, match="has 0 held-out tokens to predict, but the preset 'auto' chooses by these"):
        compress_moe(one_layer(), "auto", calibration=ROWS[:1], progress=False)


def test_rows_of_one_token_leave_nothing_to_choose_by():
    with pytest.raises(ValueError, match="chooses by these"):
        compress_moe(one_layer(), "auto", calibration=ROWS[:, :1], progress=False)


def test_models_that_predict_no_next_token_are_refused():
    with pytest.raises(ValueError, match=r"compares the next tokens.*Or name another preset"):
        compress_moe(tiny_model("switch_transformers"), "auto", calibration=ROWS, progress=False)


def test_a_compressed_model_and_a_wrong_layer_are_refused_as_ever(mapped):
    with pytest.raises(ValueError, match="already compressed"):
        compress_moe(copy.deepcopy(mapped), "auto", calibration=ROWS, progress=False)
    with pytest.raises(ValueError, match="exclude_layers has 7"):
        run(one_layer(), exclude_layers=[7])


# --- what is said


def test_the_report_and_the_configuration_say_what_was_tried(mapped):
    assert mapped.config.merged_sparse_moe["provenance"]["chosen_by"] == "auto"
    tried = mapped.compression_report.to_dict()["tried"]
    assert json.loads(json.dumps(tried)) == tried
    assert all(trial["seconds"] > 0 for trial in tried)
    table = auto.table_of(mapped.compression_report.tried).splitlines()
    assert len(table) == 5 and sum(line.startswith("*") for line in table) == 1
    best = next(trial for trial in mapped.compression_report.tried if trial.is_chosen)
    assert any(line.startswith(f"* {best.label}: KL {best.kl:.5f}") for line in table)


@pytest.mark.parametrize("layout", ["mapped", "native"])
def test_a_plan_is_that_of_the_first_candidate_and_of_what_comes_out(layout):
    model = tiny_model("mixtral", intermediate_size=96)
    planned = plan(model, request(keep=0.5, layout=layout).to_recipe())
    assert planned == plan(model, recipe_from_preset(CANDIDATES[layout][0][0], keep=0.5, layout=layout))
    layers = find_layers(model)

    def check(recipe):
        check_layout(layers, recipe, model=model)

    found = candidates(recipe_from_preset("auto", keep=0.5, layout=layout), check)
    for one in found:  # half of 8 * 96 neurons: 8 * 48, or 6 * 64, or 4 * 96
        assert plan(model, one.recipe).expert_parameters_after == planned.expert_parameters_after
    recipe = Recipe(keep=0.25)
    assert recipe_to_plan(recipe, check) is recipe


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


@pytest.mark.slow
def test_the_command_line_shows_what_was_tried(tmp_path):
    one_layer().save_pretrained(tmp_path / "in")
    np.save(tmp_path / "tokens.npy", ROWS.numpy())
    options = (tmp_path / "in", "--preset", "auto", "--keep", "0.5")
    calibration = ("--calibration", tmp_path / "tokens.npy")
    result = command("compress", *options, *calibration, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Recipes tried, on held-out tokens" in result.stdout and result.stdout.count(" yes ") == 1
    assert all(label in result.stdout for label in labels("mapped"))
    report = read_report(tmp_path / "out")
    chosen = next(trial for trial in report["tried"] if trial["is_chosen"])
    assert report["recipe"]["preset"] == chosen["preset"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.merged_sparse_moe["provenance"]["chosen_by"] == "auto"
    assert "Chosen by `auto` from 4 recipes" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    planned = json.loads(command("plan", *options, "--layout", "native", "--json").stdout)
    assert planned["layout"] == "native" and planned["layers"][0]["experts_after"] == 8
