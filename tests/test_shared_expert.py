"""The shared expert of a layer: found, refitted with the routed experts, and the same in every executor and file."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from all_families import STANDARD, every_run_or_slow, tiny
from checkpoints import same_tensors, tensors, texts
from torch import nn
from transformers import AutoModelForCausalLM

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors.in_memory import collect
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.families.residual import first_tensor
from hf_mcsmoe.layer.beside import beside_experts, write_beside
from hf_mcsmoe.observation.beside_experts import BesideExperts
from hf_mcsmoe.observation.layer_inputs import LayerInputs
from hf_mcsmoe.observation.shared_features import routed_scale, shared_features

FAMILIES = ("qwen2_moe", "deepseek_v3", "glm4_moe", "nemotron_h")
REFIT = {"refit": "least_squares"}
ALONE = {**REFIT, "refit_options": {"shared_expert": False}}
DROP = {"similarity": None, "grouping": "drop", "alignment": None, "merging": None, "allocation": "uniform"}
CONSTANTS = {**DROP, "constants": "gate_weighted_mean"}
RECIPES = {
    "merged": {"allocation": "uniform"},
    "native": {"layout": "native", **DROP},
    "constants": CONSTANTS,
    "neurons": {**DROP, "selection": "gated_obs", "keep": 0.6},
    "matched": {"allocation": "uniform", "matching": "adam", "matching_options": {"steps": 20}},
}
WITHOUT = (  # shared experts that a refit leaves alone, and families that have none
    "axk1",  # a norm comes after the sum
    "ernie4_5_vl_moe_text",
    "inkling_text",
    "longcat_flash",
    "gemma4_text",
    "mixtral",
)
BESIDE_BLOCK = ("granitemoeshared", "granitemoehybrid", "granitemoe_swa")
SCALED = ("minimax_m3_vl_text",)


@pytest.fixture(scope="module")
def tokens():
    """Enough for the fit to be better on held-out rows: 120 rows of 20 token ids."""
    return torch.randint(3, 150, (120, 20), generator=torch.Generator().manual_seed(4))


def fit(model, tokens, **recipe):
    return compress_moe(model, Recipe(**recipe), calibration=tokens, progress=False)


def collected(model, layers, tokens):
    how = {"progress": False, "held_out_tokens": 100, "calibration_tokens": 1000}
    return collect(model, layers, load_calibration(tokens), frozenset(), **how)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- where it is, and whether it counts


@torch.no_grad()
def block_outputs(model, layer, ids):
    """(routed output, all that the layer adds), (T, D), of a forward."""
    seen = {}

    def keep(name):
        def hook(module, args, output):  # noqa: ARG001
            seen[name] = first_tensor(output).reshape(-1, layer.hidden_size)

        return hook

    paths = {"routed": layer.name, "block": layer.block_name}
    handles = [model.get_submodule(path).register_forward_hook(keep(name)) for name, path in paths.items()]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen["routed"], seen["block"]


@pytest.mark.parametrize("key", every_run_or_slow([key for key in STANDARD if key not in WITHOUT]))
def test_what_its_features_give_is_what_the_layer_adds_beside_the_routed_experts(key, tokens):
    model = tiny(key)
    layers = [layer for layer in find_layers(model) if layer.shared is not None]
    if not layers:
        assert not any("shared" in name for name, _ in model.named_modules())
        return
    found = collected(model, layers, tokens % 130 + 1)
    scales = {layer.name: routed_scale(layer, found[layer.name].held_out) for layer in layers}
    if all(scale is None for scale in scales.values()):
        assert not found[layers[0].name].held_out.router_calls  # a part of the model that was not run
        return
    for layer in layers:
        assert layer.shared.in_block == (key not in BESIDE_BLOCK)
        assert scales[layer.name] == (2.0 if key in SCALED else 1.0)
        states, index, weights = found[layer.name].held_out.experts_inputs[0]
        added = shared_features(layer.shared, states) @ layer.shared.down.weight.T
        expected = layer.shared.module(states)
        if layer.shared.gate is not None:
            expected = expected * torch.sigmoid(layer.shared.gate(states))
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)
        if layer.shared.in_block and not getattr(layer.block, "is_hash", False):
            routed = layer.experts(states, index, weights)
            output = first_tensor(layer.block(states[None])).reshape(routed.shape)
            torch.testing.assert_close(output, scales[layer.name] * routed + added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", WITHOUT)
def test_what_cannot_be_fitted_is_left_alone(key, tokens):
    model = tiny(key)
    layers = find_layers(model)
    found = collected(model, layers, tokens % 130 + 1)
    for layer in layers:
        assert layer.shared is None or routed_scale(layer, found[layer.name].held_out) is None


def test_a_block_that_adds_something_else_is_left_alone(original, tokens):
    changes = {
        "tanh": lambda block, x: torch.tanh(block.shared_expert_gate(x)) * block.shared_expert(x),
        "twice": lambda block, x: 2 * torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x),
        "other tokens": lambda block, x: (
            torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x.roll(1, 0)).roll(-1, 0)
        ),
        "nothing": lambda block, x: 0 * block.shared_expert(x),
        "as it is": lambda block, x: torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x),
    }
    model = original("qwen2_moe")
    layer = find_layers(model)[0]
    inputs = collected(model, [layer], tokens)[layer.name].held_out
    scales = {}
    for name, change in changes.items():

        class Block(type(layer.block)):
            def forward(self, hidden_states, change=change):
                flat = hidden_states.reshape(-1, hidden_states.shape[-1])
                _, weights, index = self.gate(flat)
                return (self.experts(flat, index, weights) + change(self, flat)).view(hidden_states.shape)

        layer.block.__class__ = Block
        scales[name] = routed_scale(layer, inputs)
    assert scales == {**dict.fromkeys(changes), "as it is": 1.0}
    assert routed_scale(layer, LayerInputs()) is None


def test_modes_of_modules_stay_and_dropout_does_not_hide_the_sum(original, tokens):
    model = original("qwen2_moe")
    layer = find_layers(model)[0]
    inputs = collected(model, [layer], tokens)[layer.name].held_out
    layer.shared.module.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    model.train()
    layer.shared.gate.eval()
    assert routed_scale(layer, inputs) == 1.0
    assert torch.equal(
        shared_features(layer.shared, torch.ones(3, 32)), shared_features(layer.shared, torch.ones(3, 32))
    )
    assert layer.shared.module.act_fn[1].training and not layer.shared.gate.training


class Other(nn.Linear):
    """A linear layer that is more than one."""


def test_a_last_matrix_that_is_shared_or_special_is_not_fitted(original):
    model = original("deepseek_v3")
    first, second = find_layers(model)
    first.shared.module.down_proj.weight = second.shared.module.down_proj.weight
    assert all(layer.shared is None for layer in find_layers(model))
    model = original("deepseek_v3")
    find_layers(model)[0].shared.module.down_proj.__class__ = Other
    assert [layer.shared is not None for layer in find_layers(model)] == [False, True]
    first, second = find_layers(original("deepseek_v3"))
    model = original("deepseek_v3")
    one, other = find_layers(model)
    for name in one.expert_parameters:
        setattr(other.experts, name, getattr(one.experts, name))
    assert all(layer.shared is None for layer in find_layers(model))


# --- what the refit makes of it


def slow_layer(model, layer, merged, groups, ids):
    """(features (T, P + P'), targets (T, D)) in float64 of a layer whose experts became `merged`, with loops."""
    caught = []
    handle = layer.experts.register_forward_hook(lambda _, args, output: caught.append((args, output)))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    ((states, slots, weights), routed) = caught[0]
    num_experts, width = merged.up.shape[:2]
    dropped = [slot for slot, group in enumerate(groups) if group < 0]
    act = torch.nn.functional.silu
    shared, gate = layer.shared.module, layer.shared.gate
    rows = []
    for x, chosen, g in zip(states.double(), slots.tolist(), weights.double().tolist(), strict=True):
        row = torch.zeros(num_experts * width, dtype=torch.float64)
        constants = torch.zeros(len(dropped), dtype=torch.float64)
        for slot, weight in zip(chosen, g, strict=True):
            if groups[slot] < 0:
                constants[dropped.index(slot)] += weight
                continue
            m = groups[slot]
            neurons = act(merged.gate[m].double() @ x) * (merged.up[m].double() @ x)
            row[m * width : (m + 1) * width] += weight * neurons
        of_shared = act(shared.gate_proj.weight.double() @ x) * (shared.up_proj.weight.double() @ x)
        of_shared = of_shared * (1.0 if gate is None else torch.sigmoid(gate.weight.double() @ x))
        rows.append(torch.cat([row, of_shared, constants]).detach())
    return torch.stack(rows), routed.double()


def slow_solution(phi, targets, start, widths, ridge):
    """The matrix of least squares with a ridge that pulls to `start`, each block's relative to its mean energy."""
    squares, roots = (phi**2).sum(0), np.zeros(phi.shape[1])
    place = 0
    for width in widths:
        own = squares[place : place + width].mean()
        roots[place : place + width] = (ridge * (own if own > 0 else squares.mean())) ** 0.5
        place += width
    rows, wanted = np.concatenate([phi, np.diag(roots)]), np.concatenate([targets, roots[:, None] * start])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0]


@pytest.mark.parametrize("kind", ["merged", "constants"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "glm4_moe"])
def test_the_refit_is_least_squares_of_numpy_on_all_that_the_layer_adds(model_type, kind, original, tokens):
    ridge, recipe = 0.5, RECIPES[kind]
    data = load_calibration(tokens)
    ids = torch.cat([batch.inputs["input_ids"] for batch in data.batches if not batch.held_out])
    model = original(model_type)
    layer = find_layers(model)[0]
    plain = fit(original(model_type), tokens, **recipe)
    result = fit(original(model_type), tokens, **recipe, **REFIT, refit_options={"ridges": (ridge,)})
    assert result.compression_report.layers[0].shared_expert_refitted
    before, after = find_layers(plain)[0], find_layers(result)[0]
    views = [one.family.view(one, one.family.stack(one, dict(one.expert_parameters))) for one in (before, after)]
    groups = result.compression_report.layers[0].group_of_expert
    phi, targets = slow_layer(model, layer, views[0], groups, ids)
    width, num_dropped = layer.shared.down.in_features, groups.count(-1)
    start = torch.cat(
        [
            views[0].down.transpose(1, 2).flatten(0, 1).double(),
            layer.shared.down.weight.T.double(),
            *([before.experts.constant_outputs.vectors.double()] if num_dropped else []),
        ]
    )
    goal = targets + phi[:, -width - num_dropped :][:, :width] @ layer.shared.down.weight.T.double()
    widths = [views[0].width] * views[0].num_experts + [width] + ([num_dropped] if num_dropped else [])
    expected = slow_solution(phi.numpy(), goal.detach().numpy(), start.detach().numpy(), widths, ridge)
    found = torch.cat(
        [
            views[1].down.transpose(1, 2).flatten(0, 1),
            after.shared.down.weight.T,
            *([after.experts.constant_outputs.vectors] if num_dropped else []),
        ]
    )
    torch.testing.assert_close(found.detach().double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-3)
    moved = (found.double() - start).abs().amax(1)
    assert moved[-width - num_dropped :].max() > 0.01


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("model_type", ["qwen2_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_the_reported_error_is_that_of_all_that_the_layer_adds(model_type, name, original, tokens):
    ids = torch.cat([b.inputs["input_ids"] for b in load_calibration(tokens).batches if b.held_out])
    model = original(model_type)
    layer = find_layers(model)[0]
    routed, wanted = block_outputs(model, layer, ids)
    errors = {}
    for how, options in (("alone", ALONE), ("together", REFIT)):
        result = fit(original(model_type), tokens, **RECIPES[name], **options)
        report = result.compression_report.layers[0]
        _, output = block_outputs(result, layer, ids)
        errors[how] = ((output - wanted).square().sum() / routed.square().sum()).item()
        assert report.relative_error == pytest.approx(errors[how], rel=1e-3)
        if name != "constants":  # whose share is no part of what the refit compares with
            assert report.refit_error_after == pytest.approx(errors[how], rel=1e-2)
        assert report.shared_expert_refitted == (how == "together")
    assert errors["together"] < errors["alone"]


@pytest.mark.parametrize("name", ["merged", "native", "constants"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_its_last_matrix_changes_and_it_loads_again(model_type, name, original, tokens, prompt, tmp_path):
    before = state(original(model_type))
    result = fit(original(model_type), tokens, **RECIPES[name], **REFIT)
    alone = state(fit(original(model_type), tokens, **RECIPES[name], **ALONE))
    layers = find_layers(original(model_type))
    changed = {f"{layer.shared.name}.down_proj.weight" for layer in layers}
    after = state(result)
    assert after.keys() == alone.keys()
    for key in before.keys() & after.keys():
        if not any(key.startswith(layer.name) for layer in layers):
            assert torch.equal(after[key], alone[key]) == (key not in changed), key
            assert (after[key].dtype, after[key].shape) == (alone[key].dtype, alone[key].shape)
    assert all(torch.equal(alone[key], before[key]) for key in changed)
    result.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again(prompt).logits, result(prompt).logits)
    assert ("merged_sparse_moe" in result.config.to_dict()) == (name != "native")


@pytest.mark.parametrize("layout", ["mapped", "native"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_where_all_experts_stay_it_stays_too(model_type, layout, original, tokens):
    result = fit(original(model_type), tokens, layout=layout, keep=1.0, **REFIT)
    after = state(result)
    for layer in find_layers(original(model_type)):
        key = f"{layer.shared.name}.down_proj.weight"
        assert torch.equal(after[key], layer.shared.down.weight)
    assert not any(layer.shared_expert_refitted for layer in result.compression_report.layers)


def test_held_out_tokens_that_contradict_the_fit_keep_it(original, tokens, monkeypatch):
    monkeypatch.setattr("hf_mcsmoe.refit.least_squares.RIDGES", (1e-9,))
    few = tokens[:2, :3]  # far fewer tokens than neurons
    result = fit(original("qwen2_moe"), few, refit_options={"ridges": (1e-9,)}, **RECIPES["constants"], **REFIT)
    plain = fit(original("qwen2_moe"), few, **RECIPES["constants"])
    dropped = [layer for layer in result.compression_report.layers if not layer.shared_expert_refitted]
    assert dropped and all(layer.refit_error_after >= layer.refit_error_before for layer in dropped)
    for entry in dropped:
        block = entry.layer.removesuffix(".experts")
        names = (f"{block}.shared_expert.down_proj.weight", f"{entry.layer}.constant_outputs.vectors")
        assert all(torch.equal(state(result)[name], state(plain)[name]) for name in names)


def test_its_matrix_is_rounded_once(original, tokens):
    model = original("qwen2_moe").to(torch.bfloat16)
    layer = find_layers(model)[0]
    old = layer.shared.down.weight.detach().clone()
    change = torch.randn(20, 32, generator=torch.Generator().manual_seed(2)) / 50
    inputs = collected(model, [layer], tokens)[layer.name]
    beside = beside_experts(layer, Recipe(**REFIT), inputs, torch.zeros(2, 32))
    assert beside.widths == (20, 2) and not beside.change.any()
    found = BesideExperts(beside.shared, (20, 2), torch.cat([change, torch.ones(2, 32)]))
    layer.experts.constant_outputs = type("Constants", (), {"vectors": torch.zeros(2, 32)})()
    left = write_beside(layer, found, torch.full((2, 32), 3.0, dtype=torch.float64))
    new = layer.shared.down.weight
    assert new.dtype == torch.bfloat16 and new.requires_grad
    assert torch.equal(new, (old.float() + change.T).to(torch.bfloat16)) and not torch.equal(new, old)
    assert torch.equal(left.change, (new.float() - old.float()).T) and left.widths == (20, 0)
    assert torch.equal(layer.experts.constant_outputs.vectors, torch.full((2, 32), 4.0))


def test_the_option_must_be_a_flag():
    with pytest.raises(ValueError, match=r"^shared_expert is 'no', it must be True or False\. Leave it out"):
        Recipe(refit="least_squares", refit_options={"shared_expert": "no"})


# --- the same in every executor and wherever weights are kept


@pytest.mark.parametrize("name", [*RECIPES, "sequential"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_streaming_gives_what_compressing_in_memory_gives(model_type, name, checkpoint, stream, tokens, tmp_path):
    recipe = {**RECIPES["merged"], "sequential": True, **REFIT} if name == "sequential" else {**RECIPES[name], **REFIT}
    folder = checkpoint(model_type)
    result = stream(folder, **recipe)
    whole = {"output_dir": tmp_path / "whole", "executor": "in_memory", "progress": False}
    compress_moe(folder, Recipe(**recipe), calibration=tokens, **whole)
    assert any(layer.shared_expert_refitted for layer in result.compression_report.layers)
    assert same_tensors(tmp_path / "streamed", tmp_path / "whole")
    assert texts(tmp_path / "streamed") == texts(tmp_path / "whole")
    written, before = tensors(tmp_path / "streamed"), tensors(folder)
    for entry in result.compression_report.layers:
        block = entry.layer.removesuffix(".experts")
        (key,) = [key for key in before if key.startswith(f"{block}.shared") and key.endswith("down_proj.weight")]
        assert torch.equal(written[key], before[key]) != entry.shared_expert_refitted


@pytest.mark.filterwarnings("ignore:.*(offloaded modules|current device_map).*:UserWarning")
@pytest.mark.parametrize("name", ["merged", "constants"])
@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_offloaded_weights_are_fitted_as_others_are(way, name, original, tokens, prompt, tmp_path):
    recipe = {**RECIPES[name], **REFIT}
    expected = fit(original("qwen2_moe"), tokens, **recipe)
    model = copy.deepcopy(original("qwen2_moe"))
    if way == "cpu":
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    result = fit(model, tokens, **recipe)
    assert all(layer.shared_expert_refitted for layer in result.compression_report.layers)
    assert find_layers(result)[0].shared.down.weight.is_meta
    with torch.no_grad():
        assert torch.equal(result(prompt).logits, expected(prompt).logits)
