"""`hf-mcsmoe report`, and who else makes the page."""

import json
import shutil
import sys

import pytest
from synthetic_reports import synthetic_report
from test_publishing import EVALUATION
from typer.testing import CliRunner

from hf_mcsmoe.cli import app
from hf_mcsmoe.cli.evaluate import save_scores
from hf_mcsmoe.publishing import PAGE_FILE, read_report, write_report
from hf_mcsmoe.publishing.checkpoint_files import checkpoint_files
from hf_mcsmoe.publishing.published import published

EXAMPLE = "report qwen3-half"


@pytest.fixture
def folder(tmp_path):
    """A folder with a report and nothing else."""
    (tmp_path / "half").mkdir()
    write_report(synthetic_report(2, 4), tmp_path / "half")
    return tmp_path / "half"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})


@pytest.mark.usefixtures("plots")
def test_the_report_of_a_folder_is_shown_and_its_page_made_there(folder):
    result = run("report", folder)
    assert result.exit_code == 0, result.output
    assert "model.layers.1.mlp.experts" in result.output and "4 -> 3" in result.output
    assert f"{PAGE_FILE} and 4 plots" in " ".join(result.output.split())
    assert {path.name for path in folder.iterdir()} >= {PAGE_FILE, "plots"}


def test_the_page_can_go_elsewhere(folder, tmp_path):
    result = run("report", folder, "--output", tmp_path / "x" / "pages", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout) == read_report(folder)
    assert (tmp_path / "x" / "pages" / PAGE_FILE).is_file() and not (folder / PAGE_FILE).exists()


def test_the_example_in_its_help_runs(folder, monkeypatch):
    assert f"Example: hf-mcsmoe {EXAMPLE}" in " ".join(run("report", "--help").output.split())
    opened = []
    monkeypatch.setattr("typer.launch", opened.append)
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "qwen3-half")
    assert run(*EXAMPLE.split()).exit_code == 0 and opened == []
    assert run(*EXAMPLE.split(), "--open").exit_code == 0
    assert opened == [(folder.parent / "qwen3-half" / PAGE_FILE).as_uri()]


def test_bad_input_is_one_line(folder, tmp_path, monkeypatch):
    for name, message in ((tmp_path / "none", "There is no folder"), (tmp_path, "Give the folder of a model that")):
        result = run("report", name)
        assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # noqa: ARG005
    result = run("report", folder)
    assert result.exit_code == 2 and "pip install matplotlib" in result.stderr
    assert not (folder / PAGE_FILE).exists()


def test_saved_scores_are_on_the_page(folder):
    run("report", folder)
    assert "Not evaluated" in (folder / PAGE_FILE).read_text()
    save_scores(str(folder), EVALUATION)
    page = (folder / PAGE_FILE).read_text()
    assert "Not evaluated" not in page and f"{EVALUATION.overall.kl:.4f}" in page


@pytest.mark.slow
@pytest.mark.usefixtures("plots")
def test_a_push_takes_page_plots_and_statistics_as_they_are(checkpoint, stream, tmp_path):
    stream(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "secret-project" / "model"), keep=0.5)
    files, left_out = checkpoint_files(tmp_path / "streamed")
    contents = published(files, "me/half")
    names = {f"plots/{name}.png" for name in ("sizes", "layers", "usage", "similarity")}
    names |= {PAGE_FILE, "statistics/compression_statistics.safetensors"}
    assert names <= contents.keys() and left_out == []
    assert {name for name in names if isinstance(contents[name], bytes)} == set()
    for name, content in contents.items():
        written = content if isinstance(content, bytes) else content.read_bytes()
        assert b"secret-project" not in written and str(tmp_path).encode() not in written, name
    assert b"![Size before and after](plots/sizes.png)" in contents["README.md"]
