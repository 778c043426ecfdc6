"""Processes that share the calibration batches and the layers make what one process makes."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from many_processes import read_result, run_in_processes, write_result
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from hf_mcsmoe import calibrate_moe, compress_moe, pipeline
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors.in_memory import Collected, collect
from hf_mcsmoe.executors.processes import working_together
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.observation.layer_inputs import LayerInputs, TensorOfBlock
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.types import LayerStatistics

SLOW = pytest.mark.slow
# (model type, preset, changes): what calibration leaves for each is of another kind.
CASES = {
    "sums, one budget for all layers": ("qwen3_moe", "m-smoe", {}),
    "kept tokens, refit, ragged": ("qwen3_moe", "joint-obs", {}),
    "native rows": ("deepseek_v3", "reap", {"layout": "native"}),
    "every expert on a sample": ("qwen3_moe", "hc-smoe", {}),
    "gradients": ("qwen3_moe", "heapr", {}),
    "native and narrower": ("mixtral", "narrow-obs", {}),
    "experts with biases": ("gpt_oss", "m-smoe", {"layout": "native", "refit": "least_squares"}),
    "layer after layer": ("qwen3_moe", "m-smoe", {"sequential": True, "refit": "least_squares"}),
    "the original stream": ("qwen3_moe", "joint-obs-corrected", {}),
    "one budget of neurons": ("qwen3_moe", "joint-obs-corrected", {"allocation": "fisher_curve"}),
    "one budget of neurons, taken apart once": (
        "qwen3_moe",
        "joint-obs",
        {"allocation": "removal_curve", "selection": "joint_obs"},
    ),
    "unions of neurons": ("qwen3_moe", "m-smoe-union", {}),
    "a shared expert": ("deepseek_v3", "frequency", {"layout": "native", "refit": "least_squares"}),
    "a shared expert and constants": ("qwen2_moe", "mone", {"refit": "least_squares"}),
    "factors": ("olmoe", "mc-smoe", {}),
    "a shared base": ("qwen3_moe", "resmoe", {}),
    "a trained router": ("qwen3_moe", "m-smoe", {"matching": "adam", "matching_options": {"router": True}}),
    "experts of their own": ("switch_transformers", "m-smoe", {}),
}
FAST = ("sums, one budget for all layers", "kept tokens, refit, ragged", "a shared expert and constants")


def batches(rows, batch_size):
    """Rows with padding on both sides, so that a token's place in a batch is not its place among the real ones."""
    ids = torch.randint(3, 150, (rows, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[::3, :6] = 0
    mask[1::4, -3:] = 0
    return {"calibration": {"input_ids": ids, "attention_mask": mask}, "batch_size": batch_size}


def same_values(one, other):
    """Whether two nests of containers are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_values, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(value, other[name]) for name, value in one.items())
    return one == other


def assert_same(found, expected):
    """Equal but for the rounding of sums in another order: decisions are the same, numbers nearly."""
    (tensors, report), (expected_tensors, expected_report) = found, expected
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(
            tensor, expected_tensors[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    for layer, other in zip(report.pop("layers"), expected_report.pop("layers"), strict=True):
        assert layer.keys() == other.keys()
        for key, value in layer.items():
            assert value == pytest.approx(other[key], rel=1e-3) if isinstance(value, float) else value == other[key], (
                key
            )
    for name, values in report.pop("statistics").items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(expected_report["statistics"][name]))
    del expected_report["statistics"]
    assert report == expected_report


def compress_everywhere(model, recipe, data, count, folder):
    """Compress in one process and in several; returns (result of each process, result of one)."""

    def work(rank):
        write_result(compress_moe(copy.deepcopy(model), recipe, progress=False, **data), folder, f"rank-{rank}")

    assert run_in_processes(count, folder / "group", work) == [None] * count
    write_result(compress_moe(copy.deepcopy(model), recipe, progress=False, **data), folder, "one")
    return [read_result(folder, f"rank-{rank}") for rank in range(count)], lambda: read_result(folder, "one")


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in FAST else SLOW) for case in CASES])
def test_processes_give_what_one_gives(case, tmp_path):
    model_type, preset, changes = CASES[case]
    model, recipe = tiny_model(model_type), recipe_from_preset(preset, **changes)
    count = 2 if case in FAST else 3
    results, expected = compress_everywhere(model, recipe, batches(24, batch_size=5), count, tmp_path)
    for result in results:
        for name, tensor in result[0].items():
            assert torch.equal(tensor, results[0][0][name]), name  # the same bits in all processes
        assert_same(result, expected())


@pytest.mark.parametrize(("count", "rows"), [(2, 1), pytest.param(3, 2, marks=SLOW)])
def test_a_process_may_have_no_batch_and_then_sums_are_the_same_to_the_bit(count, rows, tmp_path):
    model, recipe = tiny_model("qwen3_moe"), recipe_from_preset("joint-obs")
    data = {"calibration": torch.randint(3, 150, (rows, 20)), "batch_size": 4}
    results, expected = compress_everywhere(model, recipe, data, count, tmp_path)
    tensors, report = expected()
    for found, found_report in results:
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert found_report == report


def test_each_batch_runs_once_and_what_is_kept_is_in_the_order_of_one_process(tmp_path):
    needs = frozenset({"logit_gram", "output_max", "output_cosine_sum", "gate_sum", "routed_output_sum"})
    given = batches(24, batch_size=4)
    model, data = tiny_model("gpt_oss"), load_calibration(given["calibration"], batch_size=4)
    layers = find_layers(model)
    amounts = {"held_out_tokens": 13, "calibration_tokens": 31, "every_expert_tokens": 17, "progress": False}

    def work(rank):
        ran = []
        model.register_forward_pre_hook(lambda *_: ran.append(0))
        with working_together() as processes:
            processes.share_layers([layer.name for layer in layers], {})
            found = collect(model, layers, data, needs, **amounts)
            assert sum(processes.gather(len(ran))) == len(data.batches) == 7 and len(ran) in (2, 3)
            torch.save({name: one for name, one in found.items() if processes.owns(name)}, tmp_path / f"{rank}.pt")

    assert run_in_processes(3, tmp_path / "group", work) == [None] * 3
    found = {}
    for rank in range(3):
        with torch.serialization.safe_globals([Collected, LayerInputs, LayerStatistics, TensorOfBlock]):
            found |= torch.load(tmp_path / f"{rank}.pt", weights_only=True)
    for name, one in collect(model, layers, data, needs, **amounts).items():
        other = found.pop(name)
        assert other.statistics.num_tokens == one.statistics.num_tokens
        assert torch.equal(other.statistics.selection_count, one.statistics.selection_count)
        for statistic, value in one.statistics.sums.items():
            torch.testing.assert_close(other.statistics[statistic], value, rtol=1e-12, atol=1e-12)
        for part in ("held_out", "calibration"):
            inputs, others = getattr(one, part), getattr(other, part)
            assert len(inputs.experts_inputs) == len(others.experts_inputs) > 0
            assert same_values(inputs.experts_inputs, others.experts_inputs)
            assert same_values(inputs.router_calls, others.router_calls)
    assert not found


def test_an_error_of_one_process_ends_all_of_them_with_its_message(monkeypatch, tmp_path):
    model = tiny_model("qwen3_moe")
    compress_layer = pipeline.compress_layer

    def failing(layer, *args):
        if "layers.1" in layer.name:
            raise ValueError("this layer is no good")
        return compress_layer(layer, *args)

    monkeypatch.setattr(pipeline, "compress_layer", failing)
    data = batches(8, batch_size=4)

    def work(rank):  # noqa: ARG001
        compress_moe(model, "m-smoe", output_dir=tmp_path / "out", progress=False, **data)

    first, second = run_in_processes(2, tmp_path / "group", work)
    assert second == "ValueError: this layer is no good"
    assert first == "ValueError: Process 1 of 2 failed with ValueError: this layer is no good"
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_shared_is_refused_before_anything_runs(tmp_path):
    model, data = tiny_model("qwen3_moe"), batches(8, batch_size=4)
    model.forward = None

    def different(rank):
        compress_moe(model, recipe_from_preset("m-smoe", keep=0.5 + rank / 4), progress=False, **data)

    errors = run_in_processes(2, tmp_path / "group", different)
    assert all("was given another recipe than process" in error for error in errors)
    model.save_pretrained(tmp_path / "model")

    def streaming(rank):  # noqa: ARG001
        where = {"output_dir": tmp_path / "out", "executor": "streaming"}
        compress_moe(tmp_path / "model", "m-smoe", progress=False, **where, **data)

    errors = run_in_processes(2, tmp_path / "other", streaming)
    assert all("executor is 'streaming', but 2 processes share the work" in error for error in errors)


def test_the_group_must_have_as_many_processes_as_were_launched(monkeypatch, tmp_path):
    def work(rank):  # noqa: ARG001
        monkeypatch.setenv("WORLD_SIZE", "3")
        compress_moe(tiny_model("qwen3_moe"), "m-smoe", progress=False, **batches(8, batch_size=4))

    errors = run_in_processes(2, tmp_path, work)
    assert all("WORLD_SIZE is 3, but the group of torch.distributed has 2" in error for error in errors)


@SLOW
@pytest.mark.parametrize("preset", ["joint-obs", "hc-smoe"])
def test_saved_statistics_are_made_and_used_by_several_processes(preset, tmp_path):
    model, data = tiny_model("qwen3_moe"), batches(24, batch_size=5)

    def work(rank):
        saved = calibrate_moe(model, [preset], tmp_path / "saved", progress=False, **data)
        for number, used in enumerate((saved, tmp_path / "one")):
            compressed = compress_moe(copy.deepcopy(model), preset, calibration=used, progress=False)
            write_result(compressed, tmp_path, f"{rank}-{number}")

    calibrate_moe(model, [preset], tmp_path / "one", progress=False, **data)
    assert run_in_processes(3, tmp_path / "group", work) == [None] * 3
    write_result(compress_moe(copy.deepcopy(model), preset, progress=False, **data), tmp_path, "expected")
    for rank in range(3):
        for number in range(2):
            assert_same(read_result(tmp_path, f"{rank}-{number}"), read_result(tmp_path, "expected"))


@SLOW
def test_the_preset_auto_takes_the_same_recipe_in_all_processes(tmp_path):
    model, data = tiny_model("qwen3_moe"), batches(24, batch_size=5)
    results, expected = compress_everywhere(model, recipe_from_preset("auto"), data, 2, tmp_path)
    for result in results:
        assert_same(result, expected())


@SLOW
def test_the_command_under_torchrun_writes_once_and_prints_once(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    rows = batches(24, batch_size=5)["calibration"]["input_ids"]
    np.save(tmp_path / "rows.npy", rows.numpy())
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hf_mcsmoe"]
    options = ["--preset", "joint-obs", "--calibration", str(tmp_path / "rows.npy"), "--batch-size", "5"]
    command = [*run, "compress", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes share the calibration batches and the layers.") == 1
    assert done.stdout.count("Written to") == 1
    assert json.loads((tmp_path / "out" / "compression_report.json").read_text())["num_processes"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    alone = compress_moe(tmp_path / "model", "joint-obs", calibration=rows, batch_size=5, progress=False)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=2e-5, atol=2e-6)
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode != 0 and "exists and is not empty" in again.stderr
