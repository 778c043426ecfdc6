"""Export of mapped results: what report and card say, what comes along, and what is refused before it is written."""

import json
import shutil

import pytest
from checkpoints import tensors
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_mcsmoe import export_checkpoint
from hf_mcsmoe.evaluation import evaluate_model, load_evaluation_data
from hf_mcsmoe.export import plan as export_plan
from hf_mcsmoe.loading import load_model
from hf_mcsmoe.publishing import read_report, write_report
from hf_mcsmoe.publishing.checkpoint_files import checkpoint_files

UNIFORM = {"keep": 0.5, "allocation": "uniform"}
RAGGED = {"keep": 0.2, "selection": "gated_obs", "refit": "least_squares"}
DECOMPOSED = {"decomposition": "low_rank_sparse", "decomposition_options": {"rank": 4, "keep_rows": 0.2}}


def test_report_and_card_say_what_is_no_longer_true(write_compressed, export, tokens):
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    scores = evaluate_model(load_model(mapped), {"d": load_evaluation_data(tokens, None)["data"]}, progress=False)
    write_report(read_report(mapped), mapped, scores)
    assert all(entry["relative_error"] is not None for entry in read_report(mapped)["layers"])
    folder, report = export(mapped)
    assert report == read_report(folder) and "evaluation" not in report
    assert all(entry["relative_error"] is None and entry["duplicate_share"] is None for entry in report["layers"])
    stored = {name: t.numel() * t.element_size() for name, t in tensors(folder).items()}
    assert report["total_bytes_after"] == sum(stored.values())
    for entry in report["layers"]:
        assert entry["bytes_after"] == sum(n for name, n in stored.items() if name.startswith(entry["layer"]))
    card = ModelCard.load(folder / "README.md")
    assert (
        card.data.library_name == "transformers" and "vllm serve" in card.text and "import hf_mcsmoe" not in card.text
    )
    text = " ".join(card.text.split())
    assert "Exported to layout `native` afterwards: The routers keep 4 of 8 entries (`dominant_rows`)" in text
    assert "those of the mapped model and left out" in text
    assert "How far this model is from the mapped one was not evaluated." in text
    checkpoint_files(folder)  # complete, with a card that the Hub takes


def test_what_stays_true_is_kept(write_compressed, export, tokens):
    mapped = write_compressed("qwen3_moe", keep=1.0, **DECOMPOSED)
    scores = evaluate_model(load_model(mapped), load_evaluation_data(tokens, None), progress=False)
    before = write_report(read_report(mapped), mapped, scores)
    _, report = export(mapped)
    assert report["evaluation"] == before["evaluation"]
    assert [e["relative_error"] for e in report["layers"]] == [e["relative_error"] for e in before["layers"]]
    assert report["recipe"] == before["recipe"] and report["warnings"] == before["warnings"]


def test_the_distance_to_the_mapped_model_is_measured_on_request(write_compressed, export, tokens):
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    data = load_evaluation_data(tokens, None)
    folder, report = export(mapped, data=data)
    scores = evaluate_model(load_model(folder), data, baseline=load_model(mapped), progress=False)
    assert report["export"]["against_mapped"] == json.loads(json.dumps(scores.to_dict()))
    assert scores.overall.kl > 0
    assert any(f"{scores.overall.kl:.4f} nats per token" in line for line in report["warnings"])
    assert "not evaluated" not in " ".join(report["warnings"])


def test_what_belongs_to_the_checkpoint_comes_along(write_compressed, export, tmp_path):
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    config = json.loads((mapped / "generation_config.json").read_text()) | {"temperature": 0.25, "do_sample": True}
    (mapped / "generation_config.json").write_text(json.dumps(config))
    others = {"tokenizer.json": "{}", "chat_template.jinja": "{{ x }}", "recovery_report.json": '{"a": 1}'}
    for name, text in others.items():
        (mapped / name).write_text(text)
    (mapped / "plots").mkdir(exist_ok=True)
    for name in ("usage.png", "plots/stale.png", "compression_report.html", "training_args.bin", ".hidden"):
        (mapped / name).write_text("stale")
    folder, _ = export(mapped)
    assert {name: (folder / name).read_text() for name in others} == others
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.25
    expected = {"README.md", "compression_report.json", "config.json", "generation_config.json", "model.safetensors"}
    expected |= {"recipe.yaml", "compression_report.html", "statistics"}
    assert {path.name for path in folder.iterdir()} - {"plots"} == {*expected, *others}
    assert (
        "stale" not in (folder / "compression_report.html").read_text() and not (folder / "plots/stale.png").exists()
    )
    file = "statistics/compression_statistics.safetensors"
    assert (folder / file).read_bytes() == (mapped / file).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_checkpoint_on_the_hub_is_fetched(write_compressed, export, monkeypatch):
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    fetched = []
    read = export_plan.read_config
    monkeypatch.setattr(export_plan, "read_config", lambda source: read(mapped if source == "me/model" else source))
    monkeypatch.setattr(export_plan, "snapshot_download", lambda source: fetched.append(source) or str(mapped))
    folder, _ = export("me/model")
    assert fetched == ["me/model"] and load_model(folder).config.num_experts == 4


def change_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refuse(folder, tmp_path, message, error=ValueError, **options):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=message):
        export_checkpoint(folder, tmp_path / "exported", progress=False, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("model_type", "recipe", "message"),
    [
        (
            "qwen3_moe",
            {"keep": 0.4, "allocation": "global_usage"},
            r"same number of experts in all layers, but 'model.layers.0.mlp.experts' has \d of 8, and '.* differ\. "
            r"Compress the original model again with allocation='uniform'",
        ),
        ("qwen3_moe", {"num_experts": 1, "allocation": "uniform"}, r"num_experts is 1, .* at least 2\. Use 2, or"),
        (
            "deepseek_v3",
            UNIFORM,
            r"chooses within 2 groups of 4 slots, of which \[\d, \d\] would stay, .* again with layout='native'",
        ),
        (
            "qwen3_moe",
            {**UNIFORM, "exclude_layers": [0]},
            r"cannot say that 'model.layers.1.mlp.experts' has 4 experts while 'model.layers.0.mlp.experts' keeps 8",
        ),
        (
            "deepseek_v3",
            {**RAGGED, "keep": 0.1},
            r"No field of DeepseekV3Config says the width 24 of the experts .* and nothing else",
        ),
    ],
)
def test_what_cannot_be_native_is_refused(model_type, recipe, message, write_compressed, tmp_path):
    refuse(write_compressed(model_type, **recipe), tmp_path, r"cannot be exported to layout 'native': .*" + message)


def test_what_is_no_mapped_checkpoint_is_refused(write_compressed, tmp_path):
    native = write_compressed("qwen3_moe", "native", layout="native")
    refuse(native, tmp_path, "is a plain qwen3_moe model, no mapped checkpoint: other runtimes load it as it is")
    refuse(tmp_path / "nativ", tmp_path, "There is no folder .*Did you mean 'native'", FileNotFoundError)
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    refuse(
        mapped,
        tmp_path,
        "Unknown router treatment 'dominant_row'.*Did you mean 'dominant_rows'",
        router="dominant_row",
    )
    refuse(mapped, tmp_path, "has no option 'x'", router_options={"x": 1})
    (mapped / "compression_report.json").unlink()
    refuse(mapped, tmp_path, "There is no .*compression_report.json", FileNotFoundError)


def test_unknown_kinds_of_experts_are_refused(write_compressed, tmp_path):
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    change_json(mapped / "config.json", lambda c: next(iter(c["layers"].values())).update(num_constants=3))
    refuse(mapped, tmp_path, "has num_constants in its layout, which no plain model can hold")


def test_a_report_of_another_checkpoint_is_refused(write_compressed, tmp_path):
    mapped = write_compressed("qwen3_moe", **UNIFORM)

    def forget(report):
        del report["layers"][1]

    def mix_up(report):
        entry = report["layers"][0]
        free = [e for e in range(8) if e not in entry["dominant_of_group"]]
        entry["dominant_of_group"] = sorted(free)[:4]

    path = mapped / "compression_report.json"
    text = path.read_text()
    change_json(path, forget)
    refuse(mapped, tmp_path, r"does not describe the layers \['model.layers.1.mlp.experts'\]")
    path.write_text(text)
    change_json(path, mix_up)
    refuse(
        mapped, tmp_path, "report does not fit the expert map of 'model.layers.0.mlp.experts': dominant_of_group must"
    )


def test_weights_that_no_plain_model_has_are_refused(write_compressed, tmp_path):
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    found = load_file(mapped / "model.safetensors")
    name = "model.layers.0.mlp.gate.weight"
    save_file({**found, name: found[name][:, :16].contiguous()}, mapped / "model.safetensors", {"format": "pt"})
    refuse(mapped, tmp_path, "size mismatch|mismatched", (ValueError, RuntimeError))


def test_a_folder_that_is_not_empty_is_replaced_only_on_request(write_compressed, export, tmp_path):
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "mine.txt").write_text("x")
    refuse(mapped, tmp_path, "exists and is not empty", FileExistsError)
    folder, _ = export(mapped, overwrite=True)
    assert not (folder / "mine.txt").exists() and (folder / "config.json").exists()


def test_an_error_while_writing_leaves_nothing(write_compressed, tmp_path, monkeypatch):
    mapped = write_compressed("qwen3_moe", **UNIFORM)

    def fail(*args, **options):  # noqa: ARG001
        raise OSError("no space left")

    monkeypatch.setattr("hf_mcsmoe.export.checkpoint.write_card", fail)
    refuse(mapped, tmp_path, "no space left", OSError)


def test_a_disk_that_is_too_small_is_noticed_before(write_compressed, tmp_path, monkeypatch):
    mapped = write_compressed("qwen3_moe", **UNIFORM)
    usage = shutil._ntuple_diskusage(1, 1, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # noqa: ARG005
    refuse(mapped, tmp_path, r"takes [\d,]+ bytes, but .* has 10 free", OSError)
