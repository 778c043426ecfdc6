import json
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load

from hf_mcsmoe.publishing.checkpoint_files import check_card

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import make_model_cards as made  # noqa: E402

MEASURE = "Stale: run `python examples/make_model_cards.py`"
RENDER = "Stale: run `python examples/make_model_cards.py --render`"
PRESETS = made.presets_with_card()


def test_every_preset_has_a_card_and_no_card_is_left_over():
    expected = {f"{made.name_of(preset)}.md" for preset in PRESETS}
    assert {path.name for path in made.CARDS.glob("tiny-*.md")} == expected, MEASURE
    assert {path.stem for path in (made.CARDS / "reports").iterdir()} == {Path(name).stem for name in expected}, (
        MEASURE
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_the_card_is_that_of_its_report_and_the_report_of_its_sources(preset):
    report = json.loads(made.report_file(made.CARDS, preset).read_text(encoding="utf-8"))
    assert report["made_from_sha256"] == made.sources_of(preset), MEASURE
    written = ModelCard.load(made.CARDS / f"{made.name_of(preset)}.md")
    assert str(made.card_of(report, preset)) == str(written), RENDER


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cards_are_whole_and_tell_nothing_about_the_machine(preset):
    path = made.CARDS / f"{made.name_of(preset)}.md"
    text, report = path.read_text(encoding="utf-8"), made.report_file(made.CARDS, preset).read_text(encoding="utf-8")
    check_card(text)
    assert metadata_load(path)["license_name"] == "psf-2.0"
    assert "not measured" not in text.split("## Method")[0].split("### ")[0] and "Benchmarks\n\nNot evaluated" in text
    assert not re.search(r"Made in|/tmp|/home|/root", text) and not re.search(r'"(/|[A-Z]:)', report)


@pytest.mark.slow
def test_measuring_again_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_model_cards.py", "--output", str(tmp_path)])
    made.main()
    for preset in PRESETS:
        old, new = (json.loads(made.report_file(folder, preset).read_text()) for folder in (made.CARDS, tmp_path))
        assert new["made_from_sha256"] == old["made_from_sha256"]
        for name, value in old["evaluation"]["overall"].items():
            if isinstance(value, float):  # of another machine the last digits may differ
                assert new["evaluation"]["overall"][name] == pytest.approx(value, rel=1e-3), (preset, name)
        card = (tmp_path / f"{made.name_of(preset)}.md").read_text()
        assert len(card.splitlines()) == len((made.CARDS / f"{made.name_of(preset)}.md").read_text().splitlines())
