"""The page of a report: its numbers, its safety, and that it needs nothing but itself."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from synthetic_reports import HOSTILE, TRIALS, WIDTH, synthetic_report
from test_publishing import EVALUATION
from test_report import older

from hf_mcsmoe.evaluation import DomainScore, Evaluation
from hf_mcsmoe.publishing import PAGE_FILE, read_report, recipe_yaml, write_card, write_pages, write_report
from hf_mcsmoe.publishing import page as page_module
from hf_mcsmoe.publishing.page_scores import flattened
from hf_mcsmoe.recipe_reading import recipe_from_dict

VOID = ("meta", "img", "br")


class Page(HTMLParser):
    """The tags of a page, its tables by the heading above, and its text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.tables, self.text, self.open = [], {}, {}, []
        self.heading = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.heading = ""
        if tag == "table":
            self.tables[self.heading] = []
        if tag == "tr":
            self.tables[self.heading].append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside in ("h1", "h2", "h3"):
            self.heading += data
        elif inside in ("td", "th"):
            self.tables[self.heading][-1][-1] += data
        self.text[self.heading] = self.text.get(self.heading, "") + data

    def loaded(self):
        """Everything that a browser would fetch."""
        names = ("src", "srcset", "data", "poster", "action", "background")
        found = [values[name] for _, values in self.tags for name in names if name in values]
        return found + [values["href"] for tag, values in self.tags if tag != "a" and "href" in values]


def page_of(folder, report, evaluation=None):
    write_report(report, folder, evaluation)
    written = write_pages(folder)
    assert written[0] == folder / PAGE_FILE and all(path.is_file() for path in written)
    return Page(written[0].read_text(encoding="utf-8"))


def number(text):
    """The first number in a cell."""
    return float(re.search(r"-?[\d,]+(\.\d+)?(e-?\d+)?", text).group().replace(",", ""))


def test_sizes_on_the_page_are_those_of_the_report(tmp_path):
    page = page_of(tmp_path, synthetic_report(3, 6))
    values = read_report(tmp_path)
    header, parameters, size, experts, rest = page.tables["Sizes"]
    assert header == ["", "before", "after", "after / before"]
    for row, name in ((parameters, "total_parameters"), (size, "total_bytes")):
        before, after = values[f"{name}_before"], values[f"{name}_after"]
        assert (number(row[1]), number(row[2]), row[3]) == (before, after, f"{after / before:.1%}")
    of_experts = [sum(layer[f"bytes_{time}"] for layer in values["layers"]) for time in ("before", "after")]
    assert [number(cell) for cell in experts[1:3]] == of_experts
    assert [number(a) + number(b) for a, b in zip(experts[1:3], rest[1:3], strict=True)] == [
        values["total_bytes_before"],
        values["total_bytes_after"],
    ]


def test_layers_on_the_page_are_those_of_the_report(tmp_path):
    page = page_of(tmp_path, synthetic_report(3, 6, narrowed=True))
    neurons = sum(sum(layer["widths"]) for layer in read_report(tmp_path)["layers"])
    assert f"18 → 10 experts with {18 * WIDTH} → {neurons} neurons in 3 MoE layers" in "".join(page.text.values())
    header, *rows = page.tables["Layers"]
    assert "rank" not in header  # no layer has one
    for position, (row, layer) in enumerate(zip(rows, read_report(tmp_path)["layers"], strict=True)):
        cells = dict(zip(header, row, strict=True))
        assert cells["layer"] == str(position)
        for column, name in (("experts", "num_experts"), ("parameters", "parameters"), ("bytes", "bytes")):
            assert cells[column] == f"{layer[f'{name}_before']:,} → {layer[f'{name}_after']:,}"
        assert cells["width"] == f"{layer['width_before']} → {layer['widths'][0]}"
        error = layer["relative_error"]
        assert cells["output error"] == ("not measured" if error is None else f"{error:.4g}")
        assert cells["error before refit"] == "0.5" and cells["duplicates"] == "25.0%"
        assert (cells["never chosen"], cells["seconds"]) == ("1", "0.50")
    assert "Layer 0 is model.layers.0.mlp.experts." in page.text["Layers"]


def test_widths_that_differ_and_ranks_are_shown(tmp_path):
    report = synthetic_report(1, 4)
    values = report.to_dict()
    values["layers"][0] |= {"widths": [8, 40], "rank": 16, "sparse_rows": 1200, "layer": "encoder.block"}
    header, row = page_of(tmp_path, values).tables["Layers"]
    cells = dict(zip(header, row, strict=True))
    assert (cells["width"], cells["rank"], cells["layer"]) == ("48 → 8 to 40", "16 + 1,200 rows", "encoder.block")


def test_a_refitted_shared_expert_is_said(tmp_path):
    values = synthetic_report(3, 6).to_dict()
    assert "shared expert" not in page_of(tmp_path, values).text["Layers"]
    values["layers"][2]["shared_expert_refitted"] = True
    text = page_of(tmp_path, values).text["Layers"]
    assert "The refit also changed the shared expert of 1 of the layers." in text


def test_scores_on_the_page_are_those_of_the_report(tmp_path):
    page = page_of(tmp_path, synthetic_report(2, 4), EVALUATION)
    _, *rows = page.tables["Quality"]
    scores = read_report(tmp_path)["evaluation"]
    expected = {**scores["domains"], "all": scores["overall"]}
    assert [row[0] for row in rows] == list(expected)
    for row, score in zip(rows, expected.values(), strict=True):
        assert number(row[1]) == score["tokens"] and row[3] == f"{score['perplexity']:,.2f}"
        assert row[5] == f"{score['loss'] - score['baseline_loss']:+.4f}"
        assert row[6] == f"{score['kl']:.4f}" and row[7] == f"{score['top1_agreement']:.1%}"
        assert row[4].startswith(f"{score['loss']:.4f}")
    assert "Not evaluated" not in page.text["Quality"]


def test_whatever_else_was_measured_is_shown(tmp_path):
    report = {**synthetic_report(1, 4).to_dict(), "evaluation": {**EVALUATION.to_dict(), "lm_eval": {}}}
    report["evaluation"]["smoke_check"] = {"model": {"eos_rate": 0.1234567, "tokens": 4096}, "runs": [{"a": 1}]}
    page = page_of(tmp_path, report)
    assert page.tables["smoke check"][1:] == [
        ["model, eos rate", "0.1235"],
        ["model, tokens", "4,096"],
        ["runs 1, a", "1"],
    ]
    assert "lm eval" not in page.tables
    assert flattened({"a": [1, 2.5], "b": None, "c": True}) == [["a", "1, 2.5"], ["b", "not measured"], ["c", "yes"]]


def test_intervals_stand_beside_their_numbers(tmp_path):
    evaluation = {**EVALUATION.to_dict(), "confidence": 0.95, "kl_top_k": 64, "baseline": "lab/big"}
    evaluation["overall"] |= {
        "loss_increase_interval": {"low": 0.125, "high": 0.25},
        "kl_interval": {"low": 0.0625, "high": 0.1875},
        "top1_agreement_interval": None,
    }
    estimate = {"value": 0.5, "interval": {"low": 0.25, "high": 0.75}}
    repetition = {"value": estimate, "baseline": {"value": 0.125, "interval": None}, "increase": None}
    evaluation["generation"] = {"prompts": 16, "repetition": repetition, "same_prefix": estimate}
    page = page_of(tmp_path, synthetic_report(1, 4), evaluation)
    assert page.tables["Quality"][-1][5:] == ["+0.2000 [+0.1250, +0.2500]", "0.1250 [0.0625, 0.1875]", "81.2%"]
    assert page.tables["generation"] == [
        ["", "base model", "this model", "increase"],
        ["repetition", "0.125", "0.5 [0.25, 0.75]", "not measured"],
    ]
    assert "prompts: 16" in page.text["generation"] and "same prefix: 0.5 [0.25, 0.75]" in page.text["generation"]
    for note in ("95% confidence", "over the 64 tokens", "Base model: lab/big."):
        assert note in page.text["Quality"]
    alone = DomainScore(1201, 2.1, 0.05, 8.0)
    page = page_of(tmp_path, synthetic_report(1, 4), Evaluation({"code": alone}, alone))
    assert page.tables["Quality"][1][2] == "not evaluated" == page.tables["Quality"][1][7]


def test_active_parameters_are_shown_where_they_are_known(tmp_path):
    report = synthetic_report(1, 4, active_parameters_before=2_000_000, active_parameters_after=1_500_000)
    page = page_of(tmp_path, report)
    assert page.tables["Sizes"][2] == ["parameters that a token uses", "2,000,000", "1,500,000", "75.0%"]


def test_what_was_not_evaluated_says_so(tmp_path):
    page = page_of(tmp_path, synthetic_report(1, 4))
    assert "Quality" not in page.tables and "Not evaluated." in page.text["Quality"]


def test_recipe_calibration_run_and_trials_are_shown(tmp_path):
    page = page_of(tmp_path, synthetic_report(1, 4, tried=TRIALS))
    report = read_report(tmp_path)
    recipe = page.text["Recipe"].removeprefix("Recipe")
    assert recipe.strip() == recipe_yaml(report).strip()
    assert recipe_from_dict(yaml.safe_load(recipe)) == recipe_from_dict(report["recipe"])
    assert ["tokens for the statistics", "31,744"] in page.tables["Calibration data"]
    run = page.tables["Run"]
    assert ["time", "1,234.5 s"] in run and ["torch", "2.13.0"] in run
    assert ["largest resident memory of the process", "12,345,678 (12.35 MB)"] in run
    assert ["largest memory that torch allocated on cuda:0", "7,654,321 (7.65 MB)"] in run
    rows = page.tables["Recipes that were tried"]
    assert rows[2] == ["joint-obs, refit=least_squares", "0.1250", "+0.0625", "12", "chosen"]
    assert rows[3] == ["x", "-", "-", "-", "it cost $1 and $2"]


def test_recovery_is_shown(tmp_path):
    recovery = {"held_out_before": {"loss_task": 3.5}, "held_out_after": {"loss_task": 2.25}, "steps": 1_000}
    report = {**synthetic_report(1, 4).to_dict(), "recovery": {**recovery, "teacher": "lab/big"}}
    page = page_of(tmp_path, report)
    heading = "Recovery: trained after the compression"
    assert page.tables[heading][1:] == [["loss task", "3.5000", "2.2500"]]
    assert "1,000 steps; teacher lab/big." in page.text[heading]


@pytest.mark.usefixtures("plots")
def test_an_older_report_has_a_page(tmp_path):
    page = page_of(tmp_path, older(synthetic_report(2, 4)))
    assert ["largest resident memory of the process", "not measured"] in page.tables["Run"]
    assert page.tables["Layers"][1][2] == "48"
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"sizes", "layers", "usage"}


@pytest.mark.usefixtures("plots")
def test_a_report_without_layers_numbers_or_name_has_a_page(tmp_path):
    changes = {"layers": [], "calibration": None, "base_model": None, "seconds": float("nan")}
    page = page_of(tmp_path, synthetic_report(1, 4, **changes))
    assert ["calibration data", "none is recorded"] in page.tables["Calibration data"]
    assert ["time", "not measured"] in page.tables["Run"]
    assert page.text["A model without a name, compressed"]


def test_text_from_outside_is_escaped(tmp_path):
    text_before = "<script>alert('&')</script>"
    values = synthetic_report(1, 4).to_dict()
    values["layers"][0]["layer"] = values["base_architecture"] = values["versions"]["torch"] = text_before
    page = page_of(tmp_path, values, EVALUATION)
    assert not {"script", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    assert page.tables["Layers"][1][0] == text_before and ["torch", text_before] in page.tables["Run"]
    cut = HOSTILE.replace("/home/secret-user/data/", "")
    assert ["source", cut] in page.tables["Calibration data"] and cut in "".join(page.text.values())


@pytest.mark.usefixtures("plots")
def test_the_page_loads_nothing_and_holds_its_plots(tmp_path):
    page = page_of(tmp_path, synthetic_report(1, 3, tried=TRIALS))
    text = (tmp_path / PAGE_FILE).read_text(encoding="utf-8")
    pictures = page.loaded()
    assert len(pictures) == 5 and all(one.startswith("data:image/png;base64,") for one in pictures)
    files = {path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert {base64.b64decode(one.split(",")[1]) for one in pictures} == files
    assert not re.search(r"url\(|@import|<link|javascript:|\bon\w+=", text)
    policy = [values["content"] for tag, values in page.tags if values.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "prefers-color-scheme: dark" in text and 'content="width=device-width' in text
    assert all(values["alt"] for tag, values in page.tags if tag == "img")


def test_no_file_but_the_report_tells_about_the_machine(tmp_path):
    page_of(tmp_path, synthetic_report(2, 4))
    write_card(tmp_path)
    telling = {
        path.name
        for path in tmp_path.rglob("*")
        if path.is_file() and (b"secret-user" in path.read_bytes() or str(tmp_path).encode() in path.read_bytes())
    }
    # Locally it keeps the path of the base model, whose card is read from there; `published` cuts it.
    assert telling <= {"compression_report.json", "README.md"}
    assert "secret-user/models" not in (tmp_path / "README.md").read_text()
    assert "Tiny-MoE, compressed" in (tmp_path / PAGE_FILE).read_text()


def test_the_page_is_the_same_each_time_and_can_go_elsewhere(tmp_path):
    write_report(synthetic_report(2, 4), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name in ("one", "other"):
        written = write_pages(tmp_path, tmp_path / name / "pages")
        assert all(path.is_relative_to(tmp_path / name / "pages") for path in written)
    assert [path for path in sorted(tmp_path.rglob("*")) if path in before] == before
    one, other = ((tmp_path / name / "pages" / PAGE_FILE).read_bytes() for name in ("one", "other"))
    assert one == other


def test_without_matplotlib_there_is_a_page_and_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(page_module, "missing_matplotlib", lambda: "no matplotlib: pip install it")
    page = page_of(tmp_path, synthetic_report(1, 4))
    assert page.loaded() == [] and "no matplotlib: pip install it" in page.text["Experts"]
    assert "no matplotlib: pip install it" in caplog.text and not (tmp_path / "plots").exists()


@pytest.mark.usefixtures("plots")
def test_the_card_shows_the_plots_that_are_there(tmp_path):
    write_report(synthetic_report(1, 4), tmp_path)
    assert "## Plots" not in write_card(tmp_path).read_text()
    write_pages(tmp_path)
    card = write_card(tmp_path).read_text()
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card)
    assert links == ["plots/sizes.png", "plots/layers.png", "plots/usage.png", "plots/similarity.png"]
    assert all((tmp_path / link).is_file() for link in links) and PAGE_FILE in card
    assert "\n\n## Plots\n\n" in card and "\n\n## Method\n" in card


def test_a_missing_report_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Give the folder of a model that hf_mcsmoe compressed"):
        write_pages(tmp_path)
    (tmp_path / "compression_report.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="pip install --upgrade"):
        write_pages(tmp_path)
