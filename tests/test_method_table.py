"""The table of methods is what the registries say, and the README shows it."""

import importlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_mcsmoe.cli import app
from hf_mcsmoe.family_table import insert
from hf_mcsmoe.method_table import MARK, method_rows, render
from hf_mcsmoe.presets import PRESETS
from hf_mcsmoe.recipe_reading import recipe_from_preset

ROWS = {row["method"]: row for row in method_rows()}


def test_the_readme_shows_the_table_of_the_registries():
    text = Path("README.md").read_text(encoding="utf-8")
    assert "<!-- methods:start -->" in text
    assert insert(text, render(method_rows()), MARK) == text, "python -m hf_mcsmoe.method_table --write README.md"


def test_every_preset_has_a_row_with_its_source():
    assert ROWS.keys() == PRESETS.keys()
    for name, row in ROWS.items():
        assert row["url"].startswith("https://") and row["paper"] and row["notes"], name


def test_a_row_says_what_the_recipe_does_and_collects():
    reap = ROWS["reap"]
    assert reap["steps"] == {"saliency": "gated_output_norm", "allocation": "uniform", "grouping": "drop"}
    assert reap["collects"] == ["gated_output_norm_sum", "selection_count"]
    assert reap["layouts"] == ["native", "mapped"]
    assert ROWS["m-smoe"]["steps"]["importance"] == "usage_frequency"
    assert ROWS["mc-smoe"]["layouts"] == ["mapped"]
    assert ROWS["narrow-obs"]["collects"] == ["selection_count", "tokens"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_layouts_of_a_row_are_those_that_the_recipe_takes(name):
    for layout in ROWS[name]["layouts"]:
        assert recipe_from_preset(name, layout=layout).layout == layout


def test_the_command_shows_all_methods_or_those_with_a_word():
    everything = CliRunner().invoke(app, ["methods"])
    assert everything.exit_code == 0 and f"{len(ROWS)} of {len(ROWS)} methods" in everything.output
    found = json.loads(CliRunner().invoke(app, ["methods", "REAP", "--json"]).output)
    assert found == [row for row in method_rows() if "reap" in f"{row['method']} {row['paper']}".lower()]
    shown = CliRunner().invoke(app, ["methods", "reap"])
    assert PRESETS["reap"].url in shown.output
    missing = CliRunner().invoke(app, ["methods", "reaper"])
    assert missing.exit_code == 2


def test_the_readme_shows_the_results_of_the_benchmark(monkeypatch):
    folder = Path("examples/benchmarks")
    monkeypatch.syspath_prepend(folder)
    summary = importlib.import_module("methods_summary").summary
    table = summary(json.loads((folder / "results/methods/methods.json").read_text(encoding="utf-8")))
    assert table.count("\n") > 30
    text = Path("README.md").read_text(encoding="utf-8")
    assert insert(text, table, "results") == text, "see examples/benchmarks/methods_summary.py"
