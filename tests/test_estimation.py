"""What `plan` says that compressing will cost, against what it costs: bytes and operations exactly."""

import dataclasses
import json

import pytest
import torch
from tiny_models import CAUSAL_FAMILIES, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hf_mcsmoe import compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.cli import app
from hf_mcsmoe.estimation import MachineRates, Workload, estimate, measure_machine
from hf_mcsmoe.estimation.memory import kept_bytes, layer_work_bytes, statistics_bytes
from hf_mcsmoe.estimation.operations import (
    Operations,
    calibration_operations,
    forward_flops,
    statistics_operations,
    step_operations,
)
from hf_mcsmoe.executors.kept_inputs import bytes_per_token, collect_first
from hf_mcsmoe.executors.wanted import wanted_by
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.loading import empty_model
from hf_mcsmoe.recipe_reading import recipe_from_preset

RATES = MachineRates(1e9, 1e9, 1e8, 1e8, 0.01)


@pytest.fixture
def data(tokens):
    return load_calibration(tokens)


@pytest.fixture
def model():
    """With experts and attention whose products torch counts."""
    model = tiny_model("qwen3_moe")
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("model_type", CAUSAL_FAMILIES)
def test_a_forward_has_the_operations_that_torch_counts(model_type):
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(3, 150, (4, 16)), use_cache=False, logits_to_keep=1)
    assert forward_flops(empty_model(model.config), 4, 16) == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["m-smoe", "hc-smoe", "sub-moe", "moe-i2", "reap", "mone", "camera-p", "joint-obs"])
def test_calibration_has_the_operations_and_leaves_the_bytes_that_are_said(preset, model, data):
    recipe, layers, work = recipe_from_preset(preset), find_layers(model), Workload.of(data)
    with FlopCounterMode(display=False) as counter:
        collected = collect_first(model, layers, {}, data, wanted_by(recipe), False)
    said = sum((statistics_operations(x, recipe, work) for x in layers), calibration_operations(model, work))
    assert said.flops == pytest.approx(counter.get_total_flops(), rel=1e-9)
    for layer in layers:
        statistics = collected[layer.name].statistics
        found = [statistics.selection_count, *statistics.sums.values()]
        assert statistics_bytes(layer, recipe) == sum(tensor.nbytes for tensor in found)
    inputs = [part for one in collected.values() for part in (one.held_out, one.calibration)]
    numbers = sum(part.num_tokens for part in inputs)
    assert kept_bytes(layers, recipe, work) == numbers * bytes_per_token(layers[0], wanted_by(recipe))


def test_unions_are_estimated_at_the_width_that_they_have_before_the_selection(model):
    """Half as many experts of twice the width: Grams of twice the numbers, and a layer's neurons in float32 twice."""
    layer, work = find_layers(model)[0], Workload(rows=64, sequence_length=20)
    union = recipe_from_preset("m-smoe-union", selection="gated_obs", refit=None)
    plain = recipe_from_preset("joint-obs", refit=None)
    size = 4 * layer.num_slots * layer.parameters_per_expert
    grams = 8 * layer.num_slots * layer.intermediate_size**2
    more = layer_work_bytes(layer, union, 4, work) - layer_work_bytes(layer, plain, 8, work)
    assert more == size + grams - 4 * layer.bytes_per_expert
    joint = dataclasses.replace(union, selection="joint_obs")
    assert layer_work_bytes(layer, joint, 4, work) > layer_work_bytes(layer, union, 4, work)
    flops = [step_operations(layer, recipe, n, work).flops for recipe, n in ((plain, 8), (union, 4), (joint, 4))]
    assert flops == sorted(flops) and flops[0] < flops[1] < flops[2]


def test_the_workload_is_that_of_the_data(data):
    work = Workload.of(data)
    assert (work.rows, work.sequence_length, work.batch_size, work.held_out_rows) == (24, 20, 8, 1)
    assert work.num_tokens == data.num_tokens and work.num_held_out_tokens == data.num_held_out_tokens
    assert work.batches == {8: 2, 7: 1, 1: 1} and sum(work.batches.values()) == len(data.batches)


CORRECTED = {"allocation": "uniform", "refit": "least_squares", "sequential": True, "targets": "original_stream"}


@pytest.mark.parametrize(
    "changes", [{"allocation": "uniform"}, {}, {"refit": "least_squares"}, {"layout": "native"}, CORRECTED]
)
def test_streaming_reads_and_writes_what_is_said(changes, checkpoint, data, tmp_path):
    folder, recipe = checkpoint("qwen3_moe"), recipe_from_preset("m-smoe", **changes)
    described = empty_model(tiny_config("qwen3_moe", dtype="bfloat16"))
    said = estimate(described, recipe, Workload.of(data))["streaming"]
    where = {"output_dir": tmp_path / "streamed", "executor": "streaming"}
    result = compress_moe(folder, recipe, calibration=data, progress=False, **where)
    summary = result.streaming_summary
    assert said.bytes_read == summary.bytes_read and said.passes == summary.forwards
    assert said.impossible is None and said.seconds is None
    headers = 25_000  # of the shards, and of what the first pass leaves
    assert said.bytes_written <= summary.bytes_written <= said.bytes_written + headers


def test_the_whole_model_is_read_and_written_once_in_memory(model, data):
    recipe = recipe_from_preset("m-smoe", keep=0.25)
    said = estimate(model, recipe, Workload.of(data), RATES)
    one = said["in_memory"]
    assert one.bytes_read == sum(p.nbytes for p in model.parameters()) and one.passes == 1
    assert one.bytes_written < one.bytes_read and one.memory.weights == one.bytes_read
    flops = one.calibration_flops + one.statistics_flops + one.steps_flops
    assert one.seconds >= flops / 1e9 + (one.bytes_read + one.bytes_written) / 1e8
    assert said["streaming"].memory.weights < one.memory.weights


def test_a_sequential_recipe_runs_layers_before_and_after_they_change_and_gradients_are_not_streamed(model, data):
    said = estimate(model, recipe_from_preset("m-smoe", sequential=True, refit="least_squares"), Workload.of(data))
    assert said["in_memory"].passes == 1 + 2
    assert said["streaming"].impossible is None and said["streaming"].passes == 3
    assert "gradients" in estimate(model, recipe_from_preset("heapr"), Workload.of(data))["streaming"].impossible


def test_this_machine_is_measured_and_what_is_said_of_another_counts():
    rates = measure_machine(torch.float32, (64, 128, 128))
    assert all(value > 0 for value in vars(rates).values())
    said = rates.with_said(5.0, 100.0)
    assert (said.flops, said.flops_float32, said.read_bytes, said.write_bytes) == (5e9, 5e9, 1e8, 1e8)
    assert rates.with_said(None, None) == rates
    assert Operations(1, 2, 3, 4).times(2) + Operations(float32=1) == Operations(2, 5, 6, 8)


def test_the_command_says_what_it_will_cost(tmp_path):
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    command = [
        "plan",
        str(tmp_path),
        "--num-samples",
        "32",
        "--sequence-length",
        "16",
        "--gflops",
        "10",
        "--disk",
        "50",
    ]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.output.split())
    assert "Cost with 32 rows of 16 tokens, estimated" in words and "At 10 GFLOP/s" in words
    cost = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)["cost"]
    assert cost["calibration"] == {"rows": 32, "sequence_length": 16, "batch_size": 8, "held_out_rows": 2}
    assert cost["in_memory"]["seconds"] > 0 and cost["streaming"]["memory"]["peak"] > 0


def test_a_model_that_cannot_be_counted_is_planned_all_the_same(tmp_path):
    tiny_config("switch_transformers").save_pretrained(tmp_path)
    shown = CliRunner().invoke(app, ["plan", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "No estimate of time and memory: The operations of" in " ".join(shown.output.split())
