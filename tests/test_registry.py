"""Names find functions, near misses are pointed out, and a new file needs no other edit."""

import importlib
import json
import sys

import pytest
import torch
from test_presets_contract import recipes_of_operators
from typer.testing import CliRunner

from hf_mcsmoe import merging
from hf_mcsmoe.cli import app
from hf_mcsmoe.merging import MERGING
from hf_mcsmoe.recipe import NOT_STATISTICS, STEPS, Recipe
from hf_mcsmoe.registry import Registry, closest, import_submodules
from hf_mcsmoe.saliency import SALIENCY
from hf_mcsmoe.statistics import STATISTICS

OPERATOR = """
from . import MERGING

@MERGING.register("{name}")
def merge(members, importance, *, power=2.0):
    return members[0] * power
"""


@pytest.fixture
def fruits():
    registry = Registry("fruit")

    @registry.register("apple", needs=("selection_count", "gate_sum"))
    def apple(basket, *, size=3, colour="red"):
        return basket, size, colour

    @registry.register("banana")
    def banana(basket, ripe=True, *extra, required):
        return basket, ripe, extra, required

    return registry


def undo_registrations(monkeypatch, registry):
    """Let the test register into copies of the registry's tables."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(registry, "_needs", dict(registry._needs))


def test_registering_returns_the_function_unchanged(fruits):
    assert fruits["apple"]("b", size=1) == ("b", 1, "red")
    assert list(fruits) == ["apple", "banana"]
    assert "apple" in fruits and "cherry" not in fruits


def test_an_unknown_name_lists_the_choices_and_the_closest_one(fruits):
    message = r"^Unknown fruit 'aple'; choose one of \['apple', 'banana'\]\. Did you mean 'apple'\?$"
    with pytest.raises(ValueError, match=message):
        fruits["aple"]
    with pytest.raises(ValueError, match=r"^Unknown fruit 'xyz'; choose one of \['apple', 'banana'\]\.$"):
        fruits["xyz"]
    with pytest.raises(ValueError, match="Unknown fruit None"):
        fruits[None]


@pytest.mark.parametrize("question", ["needs", "options"])
def test_asking_about_an_unknown_name_is_the_same_error(fruits, question):
    with pytest.raises(ValueError, match=r"Unknown fruit 'banan'.*Did you mean 'banana'"):
        getattr(fruits, question)("banan")
    with pytest.raises(ValueError, match=r"Unknown fruit 'banan'.*Did you mean 'banana'"):
        fruits.check_options("banan", {})


def test_a_taken_name_is_refused_and_the_first_function_stays(fruits):
    first = fruits["apple"]
    with pytest.raises(ValueError, match=r"fruit 'apple' is already registered. Choose another name"):
        fruits.register("apple")(lambda basket: basket)
    assert fruits["apple"] is first


def test_options_are_the_keyword_only_parameters_with_their_defaults(fruits):
    assert fruits.options("apple") == {"size": 3, "colour": "red"}
    assert fruits.options("banana") == {}  # a positional parameter and one without a default are no options


def test_an_unknown_option_names_the_function_and_the_closest_option(fruits):
    fruits.check_options("apple", {"size": 1, "colour": "green"})
    message = r"fruit 'apple' has no option 'color'; it has \['colour', 'size'\]\. Did you mean 'colour'\?"
    with pytest.raises(ValueError, match=message):
        fruits.check_options("apple", {"size": 1, "color": "green"})
    with pytest.raises(ValueError, match=r"fruit 'banana' has no option 'ripe'; it has \[\]"):
        fruits.check_options("banana", {"ripe": False})


def test_needs_are_those_of_the_decorator(fruits):
    assert fruits.needs("apple") == {"selection_count", "gate_sum"}
    assert fruits.needs("banana") == frozenset()


def test_closest_is_silent_without_a_near_miss():
    assert closest("keeep", ["keep", "seed"]) == " Did you mean 'keep'?"
    assert closest("zzz", ["keep", "seed"]) == ""
    assert closest(3, [1, 2]) == ""


@pytest.mark.parametrize("step", STEPS)
def test_every_step_needs_statistics_that_exist(step):
    known = set(STATISTICS) | NOT_STATISTICS
    assert list(STEPS[step]), f"no {step} is registered"
    for name in STEPS[step]:
        assert STEPS[step].needs(name) <= known


def test_an_operator_registered_from_outside_is_a_choice_of_recipes(monkeypatch):
    undo_registrations(monkeypatch, MERGING)

    @MERGING.register("my_merge")
    def merge(members, importance, *, power=2.0):
        return members[0] * power * importance[0]

    recipe = Recipe(merging="my_merge", merging_options={"power": 3.0})
    assert MERGING[recipe.merging] is merge
    with pytest.raises(ValueError, match=r"merging operator 'my_merge' has no option 'powr'.*Did you mean 'power'"):
        Recipe(merging="my_merge", merging_options={"powr": 3.0})


def test_what_a_new_step_needs_is_collected_for_the_recipes_that_use_it(monkeypatch):
    undo_registrations(monkeypatch, SALIENCY)
    SALIENCY.register("gates", needs=("gate_sum",))(lambda statistics, _: statistics["gate_sum"])
    assert "gate_sum" not in Recipe().statistics_needed()
    assert "gate_sum" in Recipe(saliency="gates").statistics_needed()
    assert "gate_sum" in Recipe(importance="gates").statistics_needed()


def test_a_new_file_in_the_folder_is_enough(tmp_path, monkeypatch):
    undo_registrations(monkeypatch, MERGING)
    (tmp_path / "made_up.py").write_text(OPERATOR.format(name="made_up"))
    monkeypatch.setattr(merging, "__path__", [*merging.__path__, str(tmp_path)])
    try:
        import_submodules(merging.__name__, merging.__path__)
        assert Recipe(merging="made_up", merging_options={"power": 1.0}).merging == "made_up"
    finally:
        sys.modules.pop("hf_mcsmoe.merging.made_up", None)
        vars(merging).pop("made_up", None)


def test_an_operator_from_outside_is_in_the_list_the_contract_and_recipes(tmp_path, monkeypatch, compress, prompt):
    undo_registrations(monkeypatch, MERGING)
    (tmp_path / "from_outside.py").write_text(
        "from hf_mcsmoe.merging import MERGING\n\n\n"
        '@MERGING.register("from_outside")\n'
        "def merge(members, importance, *, power=1.0):\n"
        '    """Mean by a power of importance."""\n'
        "    if importance.sum() == 0:\n"
        "        return members[0]\n"
        "    shares = importance**power / (importance**power).sum()\n"
        "    return (members * shares.float()[:, None, None]).sum(0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        importlib.import_module("from_outside")
    finally:
        sys.modules.pop("from_outside", None)
    listed = json.loads(CliRunner().invoke(app, ["methods", "--parts", "outside", "--json"]).output)
    assert [(row["step"], row["name"]) for row in listed] == [("merging", "from_outside")]
    assert listed[0]["options"] == {"power": 1.0}
    assert listed[0]["what"] == "Mean by a power of importance."
    assert recipes_of_operators()["m-smoe with from_outside"] == {"preset": "m-smoe", "merging": "from_outside"}
    result = compress("qwen3_moe", merging="from_outside", merging_options={"power": 1.0})
    expected = compress("qwen3_moe")  # by importance itself
    torch.testing.assert_close(result(input_ids=prompt).logits, expected(input_ids=prompt).logits)


def test_an_error_in_a_new_file_is_not_swallowed(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise RuntimeError('half written')")
    monkeypatch.setattr(merging, "__path__", [str(tmp_path)])
    with pytest.raises(RuntimeError, match="half written"):
        import_submodules(merging.__name__, merging.__path__)
