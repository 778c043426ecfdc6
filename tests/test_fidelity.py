"""The parts of examples/benchmarks/fidelity.py that a wrong number could hide in."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

from fidelity import Results, recipe_of
from fidelity_data import calibration_sources, calibration_without, named_files
from fidelity_rounding import round_to_dtype, round_to_int8

from hf_mcsmoe import compress_moe
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.recipe_reading import recipe_from_preset

SETTINGS = {"model": "a"}


def row(recipe, weights="int8", seed=0, **scores):
    overall = {"tokens": 7, "loss": 2.0, "loss_increase": 0.1, "kl": 0.2, "top1_agreement": 0.5, **scores}
    names = {"recipe": recipe, "keep": 0.5, "seed": seed, "weights": weights, "left_out": None, "layout": "mapped"}
    return {**names, "expert_bytes": 1000, "overall": overall, "domains": {"x": overall, "y": overall}}


def test_eight_bits_are_the_nearest_of_255_levels_of_each_row():
    model = tiny_model("gpt_oss")
    names = [layer.name for layer in find_layers(model)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    size = round_to_int8(model, names, torch.bfloat16)
    expected = 0
    for name, new in model.named_parameters():
        old = before[name]
        if not any(name.startswith(f"{layer}.") for layer in names) or name.endswith("bias"):
            assert torch.equal(new, old)
            expected += 2 * old.numel() if any(name.startswith(f"{layer}.") for layer in names) else 0
            continue
        for old_row, new_row in zip(old.flatten(0, -2), new.flatten(0, -2), strict=True):
            levels = torch.arange(-127, 128) * (old_row.abs().max() / 127)
            nearest = (old_row[:, None] - levels).abs().min(dim=1).values
            assert torch.allclose((old_row - new_row).abs(), nearest, atol=1e-6)
        expected += old.numel() + 4 * old[..., 0].numel()
    assert size == expected


def test_rows_of_zeros_stay_zeros():
    model = tiny_model("mixtral")
    names = [layer.name for layer in find_layers(model)]
    weight = next(model.get_submodule(names[0]).parameters())
    with torch.no_grad():
        weight[0] = 0
    round_to_int8(model, names, torch.float32)
    assert (weight[0] == 0).all() and (weight[1] != 0).any()


def test_bytes_in_the_dtype_of_the_checkpoint_are_those_of_the_report(tokens):
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    names = [layer.name for layer in find_layers(model)]
    compress_moe(model, recipe_from_preset("joint-obs", keep=0.5), calibration=tokens, progress=False)
    size = round_to_dtype(model, names, torch.bfloat16)
    assert size == 2 * sum(layer.parameters_after for layer in model.compression_report.layers)
    for parameter in model.get_submodule(names[0]).parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_a_domain_is_left_out_of_calibration(tmp_path):
    for number, name in enumerate("abc"):
        np.save(tmp_path / f"{name}.npy", np.full((4, 6), number + 1))
    sources = calibration_sources([f"{name}={tmp_path / name}.npy" for name in "abc"])
    data = calibration_without(sources, "b", None, None, 0)
    assert {int(token) for batch in data.batches for token in batch.inputs["input_ids"].unique()} == {1, 3}
    held_out = [batch.held_out for batch in data.batches]
    assert held_out == sorted(held_out) and data.num_held_out_tokens == 12 and data.num_tokens == 36
    with pytest.raises(ValueError, match=r"--leave-out is 'd', the calibration domains are \['a', 'b', 'c'\]"):
        calibration_without(sources, "d", None, None, 0)
    with pytest.raises(ValueError, match="names two files"):
        named_files([f"a={tmp_path / 'a.npy'}", f"a={tmp_path / 'b.npy'}"])


def test_columns_of_a_file_make_domains(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"domain": name, "text": name * 3}) + "\n" for name in "aba"))
    assert calibration_sources([str(path)]) == {"a": [{"text": "aaa"}] * 2, "b": [{"text": "bbb"}]}


def test_an_interrupted_run_goes_on_after_its_last_whole_line(tmp_path):
    results = Results(tmp_path, SETTINGS)
    original = [row("original", weights, seed=None) for weights in ("bfloat16", "int8")]
    results.add(original)
    results.add([row("m-smoe", "bfloat16", loss_increase=0.3), row("m-smoe", "int8")])
    with results.path.open("a") as file:
        file.write('{"recipe": "frequ')
    again = Results(tmp_path, SETTINGS)
    assert again.has(recipe="m-smoe", keep=0.5, seed=0, left_out=None)
    assert not again.has(recipe="m-smoe", keep=0.5, seed=1, left_out=None)
    again.add([row("m-smoe", "bfloat16", seed=1, loss_increase=0.5), row("m-smoe", "int8", seed=1)])
    assert len([json.loads(line) for line in again.path.read_text().splitlines()]) == 6
    table = (tmp_path / "results.md").read_text()
    assert "| +0.4000 [+0.3000, +0.5000] |" in table and (tmp_path / "results.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="Choose another --output"):
        Results(tmp_path, {"model": "b"})


def test_a_recipe_is_a_preset_with_changes_or_a_file(tmp_path):
    recipe = recipe_of("m-smoe:refit=least_squares,alignment=null,fit_tokens=10", 0.25, 3)
    changes = {"refit": "least_squares", "alignment": None, "fit_tokens": 10}
    assert recipe == recipe_from_preset("m-smoe", keep=0.25, seed=3, **changes)
    (tmp_path / "own.yaml").write_text("preset: frequency\nnum_experts: 2\n")
    assert recipe_of(str(tmp_path / "own.yaml"), 0.5, 1) == recipe_from_preset("frequency", keep=0.5, seed=1)
