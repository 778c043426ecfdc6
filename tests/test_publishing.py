import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from hf_mcsmoe import recipe as recipe_module
from hf_mcsmoe.evaluation import DomainScore, Evaluation
from hf_mcsmoe.presets import PRESETS, Preset
from hf_mcsmoe.publishing import REPORT_FILE, model_card, read_report, recipe_yaml, write_card, write_report
from hf_mcsmoe.publishing import card as card_module
from hf_mcsmoe.recipe import Recipe
from hf_mcsmoe.recipe_reading import recipe_from_dict, recipe_from_preset, recipe_from_yaml
from hf_mcsmoe.types import CompressionReport, LayerReport

CODE = DomainScore(1201, 2.1, 0.05, math.exp(2.1), 2.0, 0.0625, 0.875)
PROSE = DomainScore(803, 3.4, None, math.exp(3.4), 3.0, 0.25, 0.75)
ALL = DomainScore(2004, 2.6, 0.04, math.exp(2.6), 2.4, 0.125, 0.8125)
EVALUATION = Evaluation({"code": CODE, "prose": PROSE}, ALL, {"code": "file e.jsonl, domain code", "prose": "a | b"})
RECIPES = {
    "default": Recipe(),
    "preset": recipe_from_preset("m-smoe", keep=0.25, layout="native"),
    "pruning": recipe_from_preset("frequency", num_experts=8),
    # Back to values that are the defaults of Recipe, but not those of the preset.
    "undone preset": recipe_from_preset(
        "frequency", similarity="router_logits", grouping="dominant_experts", merging="average", alignment=None
    ),
    "exclusions": Recipe(keep=1.0, exclude_layers=(0, "model.layers.3.*"), collapse_duplicates=True, seed=7),
    "decomposition": Recipe(decomposition="low_rank_sparse", decomposition_options={"rank": 8, "keep_rows": 0.125}),
}


def layer_report(number, experts=8, error=0.1, unused=0):
    return LayerReport(
        layer=f"model.layers.{number}.mlp.experts",
        num_slots=16,
        num_experts_before=16,
        num_experts_after=experts,
        parameters_before=16 * 1_234,
        parameters_after=experts * 1_234,
        bytes_before=16 * 2_468,
        bytes_after=experts * 2_468,
        relative_error=error,
        duplicate_share=0.25,
        unused_experts=unused,
        seconds=0.5,
        group_of_expert=[slot % experts for slot in range(16)],
        dominant_of_group=list(range(experts)),
        usage_frequency=[1 / 16] * 16,
        widths=[64] * experts,
    )


LAYERS = [
    layer_report(0),
    layer_report(1, error=0.3),
    layer_report(3, error=0.2),
    layer_report(4, experts=6, error=None, unused=2),
    layer_report(5, error=0.05, unused=1),
]


def compression_report(recipe=None, **changes):
    report = CompressionReport(
        recipe=(recipe or recipe_from_preset("m-smoe", keep=0.5)).to_dict(),
        calibration={"sha256": "ab12" * 16, "tokens": 31_744, "held_out_tokens": 1_024, "source": "list of 40 texts"},
        layers=LAYERS,
        base_model="some-lab/Tiny-MoE",
        base_architecture="Qwen3MoeForCausalLM",
        total_parameters_before=1_234_567,
        total_parameters_after=765_432,
        total_bytes_before=2_469_134,
        total_bytes_after=1_530_864,
        seconds=12.34,
        versions={"hf_mcsmoe": "0.1.0", "transformers": "5.23.0"},
        warnings=[],
    )
    return replace(report, **changes)


def card_of(report=None, **options):
    return model_card((report or compression_report()).to_dict(), **options)


def section(card, title):
    """The lines under a heading."""
    return card.text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip().splitlines()


def table_rows(lines):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")][2:]


def test_a_report_reads_back_as_it_was_written(tmp_path):
    report = compression_report()
    written = write_report(report, tmp_path, EVALUATION)
    assert read_report(tmp_path) == read_report(tmp_path / REPORT_FILE) == written
    assert written == {**report.to_dict(), "evaluation": EVALUATION.to_dict()}
    text = (tmp_path / REPORT_FILE).read_text()
    assert text.startswith('{\n  "format_version": 1,')
    assert '"dominant_of_group": [0, 1, 2, 3, 4, 5],' in text  # one line, not one line an expert


def test_an_evaluation_can_be_added_later_and_then_stays(tmp_path):
    assert "evaluation" not in write_report(compression_report(), tmp_path)
    write_report(read_report(tmp_path), tmp_path, EVALUATION)
    write_report(read_report(tmp_path), tmp_path)
    assert read_report(tmp_path)["evaluation"] == EVALUATION.to_dict()


def test_numbers_that_json_cannot_hold_become_null_and_say_so(tmp_path):
    layers = [layer_report(0, error=math.nan), layer_report(1)]
    write_report(compression_report(layers=layers, seconds=math.inf, warnings=["kept"]), tmp_path)
    report = read_report(tmp_path)
    assert report["layers"][0]["relative_error"] is None and report["seconds"] is None
    assert report["warnings"] == [
        "kept",
        "layers[0].relative_error was nan; it is null in the report.",
        "seconds was inf; it is null in the report.",
    ]
    assert "| 0.1 (1 of 2 measured) |" in model_card(report).text


def test_strings_with_brackets_survive_the_compact_lists(tmp_path):
    source = 'a "[1,\n 2\n]" and [\n3\n]'
    write_report(compression_report(calibration={"source": source, "rows": [], "sizes": [1, 2]}), tmp_path)
    assert read_report(tmp_path)["calibration"] == {"source": source, "rows": [], "sizes": [1, 2]}


def test_reports_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Give the folder of a model that hf_mcsmoe compressed"):
        read_report(tmp_path)
    path = tmp_path / REPORT_FILE
    path.write_text(json.dumps({**compression_report().to_dict(), "format_version": 2}))
    with pytest.raises(ValueError, match=r"has format_version 2, this hf_mcsmoe reads up to 1. .*pip install --up"):
        read_report(tmp_path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="has no format_version"):
        read_report(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_report(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*Save the model there first"):
        write_report(compression_report(), tmp_path / "missing")


def test_an_invalid_recipe_is_refused_before_anything_is_written(tmp_path):
    report = replace(compression_report(), recipe={"merging": "no such method"})
    with pytest.raises(ValueError, match="Unknown merging"):
        write_report(report, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_the_recipe_file_reads_back_to_an_equal_recipe(recipe, tmp_path):
    write_report(compression_report(recipe), tmp_path)
    assert recipe_from_yaml(tmp_path / "recipe.yaml") == recipe


def test_the_recipe_file_does_not_rest_on_defaults(tmp_path, monkeypatch):
    values = yaml.safe_load(recipe_yaml(compression_report()))
    assert values["merging"] == "weighted_average" and values["allocation"] == "global_usage"
    # A preset whose options the recipe took back: the empty value must be written.
    preset = Preset("p", "https://example.org", "", {"grouping_options": {"unknown": 1}})
    monkeypatch.setitem(recipe_module.PRESETS, "with-options", preset)
    recipe = recipe_from_preset("with-options", grouping_options={})
    write_report(compression_report(recipe), tmp_path)
    assert recipe_from_yaml(tmp_path / "recipe.yaml") == recipe


def test_the_metadata_survives_the_hub_library(tmp_path):
    card = card_of(repo_name="me/Tiny-MoE-half", base_license="apache-2.0", evaluation=EVALUATION)
    card.save(tmp_path / "README.md")
    data = metadata_load(tmp_path / "README.md")
    assert data == card.data.to_dict() == ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["base_model"] == "some-lab/Tiny-MoE"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["moe", "mixture-of-experts", "model-compression", "expert-merging", "m-smoe"]
    assert ModelCard(card.content).text == card.text
    assert "{{" not in card.content and "{%" not in card.content and "None" not in card.content
    relation = card_of(base_model="other/Base", base_model_relation="finetune").data
    assert (relation.base_model, relation.base_model_relation) == ("other/Base", "finetune")


def test_a_local_base_model_is_not_published_as_an_id(tmp_path):
    folder = tmp_path / "secret-user" / "my-moe"
    folder.mkdir(parents=True)
    card = card_of(compression_report(base_model=str(folder)))
    assert card.data.base_model is None and "base_model_relation" not in card.data.to_dict()
    assert "the local model `my-moe`" in card.text and "secret-user" not in card.content
    assert "\n# my-moe compressed\n" in card.text
    assert "a model without a name" in card_of(compression_report(base_model=None)).text


def test_sizes_in_the_card_are_those_of_the_report():
    rows = table_rows(section(card_of(), "Sizes"))
    assert rows[0] == ["parameters", "1,234,567", "765,432", "62.0%"]
    assert rows[1] == ["active parameters of a token", *["not measured"] * 3]
    assert rows[2] == ["bytes", "2,469,134 (2.47 MB)", "1,530,864 (1.53 MB)", "62.0%"]
    known = compression_report(active_parameters_before=600_000, active_parameters_after=450_000)
    assert table_rows(section(card_of(known), "Sizes"))[1] == [
        "active parameters of a token",
        "600,000",
        "450,000",
        "75.0%",
    ]
    ragged = compression_report(layers=[layer_report(0), replace(layer_report(1), widths=[60, 68])])
    assert table_rows(section(card_of(ragged), "Sizes"))[1][0] == "active parameters of a token, on average"


def test_neighbouring_layers_with_equal_sizes_share_a_row():
    rows = table_rows("\n".join(section(card_of(), "Sizes")).split("\n\n")[-1].splitlines())
    assert rows == [
        ["`model.layers.0…3.mlp.experts`", "3", "16 → 8", "19,744 → 9,872", "39,488 → 19,744", "0.1 to 0.3"],
        ["`model.layers.4.mlp.experts`", "1", "16 → 6", "19,744 → 7,404", "39,488 → 14,808", "not measured"],
        ["`model.layers.5.mlp.experts`", "1", "16 → 8", "19,744 → 9,872", "39,488 → 19,744", "0.05"],
    ]
    assert "with 38 experts instead of 80 in 5 MoE layers, 47.5% of the expert parameters." in card_of().text
    narrow = [replace(layer_report(n, experts=16), parameters_after=9_872) for n in range(2)]
    narrow_card = card_of(compression_report(layers=narrow))
    assert "with 50.0% of the parameters of its 32 experts in 2 MoE layers." in narrow_card.text
    names = ["encoder.block.1.experts", "decoder.experts"]
    layers = [replace(layer_report(0), layer=name) for name in names]
    assert "| `encoder.block.1.experts … decoder.experts` | 2 |" in card_of(compression_report(layers=layers)).text


def test_the_evaluation_in_the_report_is_used():
    report = {**compression_report().to_dict(), "evaluation": EVALUATION.to_dict()}
    assert model_card(report).content == card_of(evaluation=EVALUATION).content


def test_limitations_name_the_worst_layers_and_unused_experts():
    lines = section(card_of(compression_report(warnings=["router\nlogits | had ties"])), "Limitations")
    assert lines[0].endswith(
        "`model.layers.1.mlp.experts` (0.3), `model.layers.3.mlp.experts` (0.2), `model.layers.0.mlp.experts` (0.1)."
    )
    assert "No calibration token was routed to 3 experts in 2 layers" in lines[1]
    assert lines[-1] == "- router logits \\| had ties"
    unmeasured = card_of(compression_report(layers=[layer_report(0, error=None)]))
    assert "on held-out tokens was not measured" in section(unmeasured, "Limitations")[0]
    assert "No calibration token" not in unmeasured.text


def test_native_results_load_without_the_package():
    card = card_of(compression_report(RECIPES["preset"]), repo_name="me/half")
    lines = "\n".join(section(card, "How to load"))
    assert card.data.library_name == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("me/half"' in lines and "vllm serve me/half" in lines
    assert "hf_mcsmoe" not in lines and "hf-mcsmoe" not in lines and "trust_remote_code" not in lines


def test_mapped_results_name_the_package():
    card = card_of(repo_name="me/half", has_tokenizer=False)
    lines = "\n".join(section(card, "How to load"))
    assert card.data.library_name == "hf_mcsmoe"
    assert "pip install hf-mcsmoe" in lines and "import hf_mcsmoe" in lines and "trust_remote_code=True" in lines
    assert "vllm serve" not in card.text
    assert 'AutoTokenizer.from_pretrained("some-lab/Tiny-MoE")' in lines
    assert 'AutoTokenizer.from_pretrained("path/to/this/model")' in card_of().text


@pytest.mark.parametrize(
    ("architecture", "auto_class", "pipeline_tag"),
    [
        ("SwitchTransformersForConditionalGeneration", "AutoModelForSeq2SeqLM", None),
        ("Gemma4ForConditionalGeneration", "AutoModelForImageTextToText", "image-text-to-text"),
        ("MixtralForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
        ("MixtralModel", "AutoModel", None),
    ],
)
def test_the_auto_class_follows_the_architecture(architecture, auto_class, pipeline_tag):
    recipe = Recipe(layout="native")
    card = card_of(compression_report(recipe, base_architecture=architecture))
    assert f"{auto_class}.from_pretrained(" in card.text and card.data.pipeline_tag == pipeline_tag
    assert "vllm" not in card.text


def test_the_method_cites_its_paper_and_names_what_was_changed():
    card = card_of()
    preset = PRESETS["m-smoe"]
    assert preset.paper in card.text and preset.url in section(card, "Citation")[0]
    assert "Changed from the preset" not in card.text
    changed = recipe_from_preset("m-smoe", keep=0.25, alignment=None, merging="average", exclude_layers=[0])
    method = "\n".join(section(card_of(compression_report(changed)), "Method"))
    assert "Changed from the preset: `alignment`, `merging`, `exclude_layers`." in method

    own = card_of(compression_report(RECIPES["decomposition"]))
    assert "no published preset" in section(own, "Method")[0]
    assert "factors of rank 8 plus 12.5% of the rows" in own.text
    assert "no published preset" in section(own, "Citation")[0]
    pruned = card_of(compression_report(RECIPES["pruning"]))
    assert "expert-pruning" in pruned.data.tags and "importance" not in "\n".join(section(pruned, "Method"))


def test_the_method_says_in_how_many_layers_the_shared_expert_changed():
    assert "shared expert" not in card_of().text
    layers = [replace(layer, shared_expert_refitted=place in (1, 3)) for place, layer in enumerate(LAYERS)]
    changed = section(card_of(compression_report(layers=layers)), "Method")
    assert "The refit also changed the shared expert of 2 layers." in "\n".join(changed)


def test_calibration_and_recipe_are_in_the_card():
    card = card_of()
    lines = section(card, "Calibration data")
    assert f"- SHA-256 of tokens and masks: `{'ab12' * 16}`" in lines and "- source: `list of 40 texts`" in lines
    assert "- tokens for the statistics: 31,744" in lines
    block = card.text.split("```yaml\n")[1].split("```")[0]
    assert recipe_from_dict(yaml.safe_load(block)) == recipe_from_preset("m-smoe", keep=0.5)
    assert "Made in 12.3 s with hf_mcsmoe 0.1.0, transformers 5.23.0." in card.text
    assert section(card_of(compression_report(calibration=None)), "Calibration data") == [
        "- No calibration data is recorded."
    ]


def test_the_licence_is_the_base_models_or_left_out():
    unknown = card_of()
    assert "license" not in unknown.data.to_dict() and "was not known" in section(unknown, "Licence")[0]
    other = {"license": "other", "license_name": "some-licence", "license_link": "https://example.org/licence"}
    card = card_of(base_license=other)
    assert {key: card.data.to_dict()[key] for key in other} == other
    assert section(card, "Licence")[0].startswith("[some-licence](https://example.org/licence), inherited from")


def test_a_written_card_knows_the_folder_and_the_base_models_licence(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "result"
    base.mkdir()
    folder.mkdir()
    write_report(compression_report(base_model=str(base)), folder)
    write_report(read_report(folder), folder, EVALUATION)
    assert "license" not in metadata_load(write_card(folder, repo_name="result"))

    (base / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\nlanguage: en\n---\n# Base\n")
    (folder / "tokenizer_config.json").write_text("{}")
    card = ModelCard.load(write_card(folder, repo_name="result"))
    assert (card.data.license, card.data.license_name, card.data.language) == ("other", "some-licence", None)
    assert 'AutoTokenizer.from_pretrained("result")' in card.text and "| +0.1000 |" in card.text
    assert metadata_load(write_card(folder, base_license="mit"))["license"] == "mit"

    (base / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert "license" not in metadata_load(write_card(folder))
    with pytest.raises(FileNotFoundError, match="Give the folder of a model"):
        write_card(base)


def test_the_licence_of_a_base_model_on_the_hub_is_that_of_its_cached_card(tmp_path, monkeypatch):
    monkeypatch.setattr(card_module, "try_to_load_from_cache", lambda *_: None)
    assert card_module.local_licence("some-lab/Tiny-MoE") is None
    cached = tmp_path / "README.md"
    cached.write_text("---\nlicense: apache-2.0\ntags: [moe]\n---\n")
    asked = []
    monkeypatch.setattr(card_module, "try_to_load_from_cache", lambda *names: asked.append(names) or str(cached))
    assert card_module.local_licence("some-lab/Tiny-MoE") == {"license": "apache-2.0"}
    assert card_module.local_licence(str(tmp_path)) == {"license": "apache-2.0"}  # a folder is read itself
    assert asked == [("some-lab/Tiny-MoE", "README.md")] and card_module.local_licence(None) is None


def test_text_from_outside_cannot_break_the_card():
    evaluation = Evaluation({"a | b\n# c": CODE}, ALL)
    calibration = {"source": "{{ 1 }} </td>\n---\n"}
    card = card_of(compression_report(calibration=calibration), evaluation=evaluation)
    assert table_rows(section(card, "Evaluation"))[0][0].startswith("a \\| b # c")
    assert "- source: `{{ 1 }} &lt;/td> ---`" in card.text
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()


def test_the_template_folder_shows_the_template_that_is_used():
    link = Path(__file__).parents[1] / "model_cards" / "template.md"
    assert link.resolve() == card_module.TEMPLATE.resolve()
