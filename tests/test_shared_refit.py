"""The refit of a shared expert and of constants, in whole models, files and executors."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from all_families import tiny
from checkpoints import same_tensors, tensors, texts
from transformers import AutoModelForCausalLM

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.families.residual import first_tensor

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


@pytest.fixture(scope="module")
def tokens():
    """Enough for the fit to be better on held-out rows: 120 rows of 20 token ids."""
    return torch.randint(3, 150, (120, 20), generator=torch.Generator().manual_seed(4))


def fit(model, tokens, **recipe):
    return compress_moe(model, Recipe(**recipe), calibration=tokens, progress=False)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


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
    assert errors["together"] < errors["alone"] * (1.02 if name == "matched" else 1)  # training has luck


@pytest.mark.parametrize("key", ["minimax_m3_vl_text", "hunyuan_v1_moe"])
def test_a_block_that_scales_its_routed_output_is_fitted_in_its_units(key, tokens):
    model, ids = tiny(key), tokens % 130 + 1
    layer = find_layers(model)[0]
    held_out = torch.cat([b.inputs["input_ids"] for b in load_calibration(ids).batches if b.held_out])
    routed, wanted = block_outputs(model, layer, held_out)
    result = fit(copy.deepcopy(model), ids, **RECIPES["merged"], **REFIT)
    report = result.compression_report.layers[0]
    _, output = block_outputs(result, layer, held_out)
    scale = getattr(layer.block, "routed_scaling_factor", 1.0)
    error = (output - wanted).square().sum() / (scale * routed).square().sum()
    assert report.shared_expert_refitted and scale == (2.0 if key.startswith("minimax") else 1.0)
    assert report.relative_error == pytest.approx(error.item(), rel=1e-3)
    assert report.refit_error_after == pytest.approx(error.item(), rel=1e-2)


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


def test_the_option_must_be_a_flag():
    with pytest.raises(ValueError, match=r"^shared_expert is 'no', it must be True or False\. Leave it out"):
        Recipe(refit="least_squares", refit_options={"shared_expert": "no"})


# --- the same in every executor and wherever weights are kept


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RECIPES, "sequential"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
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
