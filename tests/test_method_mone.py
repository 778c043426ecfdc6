"""MoNE: dropped experts become constants that keep their gates, in every implementation and in every file."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import get_peft_model
from slow_moe import MODELS, STUDIED, SlowLayer, kept_by, padded, ragged_rows, slow_layers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hf_mcsmoe import MergedSparseMoeConfig, compress_moe, plan
from hf_mcsmoe.constants import CONSTANTS
from hf_mcsmoe.executors.in_memory import collect_statistics
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.densify import densify
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.saliency import SALIENCY
from hf_mcsmoe.sizes import measure
from hf_mcsmoe.training.lora import lora_config
from hf_mcsmoe.types import LayerStatistics

ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


def score(layer, e, *, per_selection=False):
    routed = layer.routed_to(e)
    if not routed:
        return 0.0
    outputs = torch.stack([layer.output_for(e, token) for _, token in routed])
    deviation = outputs.std(dim=0, correction=0).norm().item()
    return deviation * sum(g for g, _ in routed) / (len(routed) if per_selection else len(layer.tokens))


def mean_output(layer, e, power):
    routed = layer.routed_to(e)
    total = sum(g**power * layer.output_for(e, token) for g, token in routed)
    return total / sum(g**power for g, _ in routed)


@pytest.fixture(scope="module", params=STUDIED)
def studied(request, original, tokens):
    """(model, rows, the same layers by the slow reference)."""
    model = original(request.param, **MODELS[request.param])
    rows = ragged_rows(tokens)
    return model, rows, slow_layers(model, rows)


def mone(model, data, **changes):
    recipe = MergedSparseMoeConfig.from_preset("mone", **changes)
    return compress_moe(copy.deepcopy(model), recipe, calibration=data, progress=False)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def constants_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("vectors")}


@pytest.mark.parametrize("per_selection", [False, True])
def test_the_score_is_what_the_formula_says(studied, per_selection):
    model, rows, slow = studied
    needs = SALIENCY.needs("output_variance")
    found, _ = collect_statistics(model, find_layers(model), padded(rows), needs)
    for layer, statistics in zip(slow, found.values(), strict=True):
        expected = [score(layer, e, per_selection=per_selection) for e in range(layer.num_experts)]
        got = SALIENCY["output_variance"](statistics, None, per_selection=per_selection)
        assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)
        num_experts, hidden = layer.down.shape[:2]
        assert statistics["routed_output_sum"].shape == (num_experts, hidden)
        assert sum(value.numel() for value in statistics.sums.values()) == num_experts * (hidden + 2)


@pytest.mark.parametrize("constants, power", [("routed_mean", 0), ("gate_weighted_mean", 2)])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_dropped_slot_adds_its_gate_times_the_constant(studied, constants, power, implementation):
    model, rows, slow = studied
    result = mone(model, padded(rows), constants=constants)
    result.set_experts_implementation(implementation)
    for layer, small, report in zip(slow, find_layers(result), result.compression_report.layers, strict=True):
        kept = kept_by([score(layer, e) for e in range(layer.num_experts)], layer.num_experts // 2)
        assert report.dominant_of_group == kept
        some = layer.tokens[:: len(layer.tokens) // 20]
        index = torch.tensor([list(token.gates) for token in some])
        gates = torch.tensor([list(token.gates.values()) for token in some])
        means = {e: mean_output(layer, e, power) for e in range(layer.num_experts) if e not in kept}
        expected = torch.stack([output_with_constants(layer, token, means) for token in some])
        with torch.no_grad():
            got = small.experts(torch.stack([t.hidden for t in some]).float(), index, gates.float())
        assert_close(got.double(), expected, **ROUNDING)


def output_with_constants(layer: SlowLayer, token, means):
    return sum(g * means.get(e, layer.output_for(e, token)) for e, g in token.gates.items())


def test_the_gate_weighted_mean_has_the_least_error():
    gates, outputs = (
        torch.tensor([0.5, 0.1, 0.9]).double(),
        torch.tensor([[1.0, 2.0], [9.0, -3.0], [0.0, 5.0]]).double(),
    )
    sums = {
        "squared_gate_sum": gates.square().sum()[None],
        "squared_gate_output_sum": (gates.square() @ outputs)[None],
        "routed_output_sum": outputs.sum(0)[None],
    }
    statistics = LayerStatistics(3, torch.tensor([3]), sums)
    best = CONSTANTS["gate_weighted_mean"](statistics)[0]
    solved = torch.linalg.lstsq(gates[:, None], gates[:, None] * outputs).solution[0]
    assert_close(best, solved)
    assert CONSTANTS["routed_mean"](statistics)[0].tolist() == pytest.approx([10 / 3, 4 / 3])


def test_an_expert_that_was_never_used_becomes_zeros(original, prompt):
    result = mone(original("mixtral"), torch.tensor([[7, 9]]), allocation="uniform")
    for layer, vectors in zip(result.compression_report.layers, constants_of(result).values(), strict=True):
        unused = [layer.usage_frequency[e] == 0 for e, group in enumerate(layer.group_of_expert) if group < 0]
        assert any(unused)
        assert [not vector.any() for vector in vectors] == unused
    assert torch.isfinite(logits(result, prompt)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_survives_disk(original, tokens, prompt, tmp_path, dtype):
    model = original("qwen3_moe")
    for parameter in model.parameters():  # not Module.to, which would also round the rotary frequencies
        parameter.data = parameter.data.to(dtype)
    model = mone(model, tokens)
    assert len(constants_of(model)) == 3 and all(p.any() and p.dtype == dtype for p in constants_of(model).values())
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded.eval(), prompt), logits(model, prompt))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{place}": ("cpu", "disk")[place % 2] for place in range(3)}
    how = {"device_map": places, "offload_folder": tmp_path / "offload", "dtype": dtype}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, **how)
    assert torch.equal(logits(offloaded, prompt), logits(model, prompt))


@pytest.mark.filterwarnings("ignore:.*(offloaded modules|current device_map).*:UserWarning")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_gets_the_same_constants(original, tokens, prompt, tmp_path, where):
    expected, model = mone(original("mixtral"), tokens), original("mixtral")
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    result = compress_moe(model, "mone", calibration=tokens, progress=False)
    assert torch.equal(logits(result, prompt), logits(expected, prompt))
    result.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded, prompt), logits(expected, prompt))


def test_streaming_writes_the_same_constants(original, tokens, tmp_path):
    original("mixtral").save_pretrained(tmp_path / "model")
    recipe = MergedSparseMoeConfig.from_preset("mone")
    where = {"output_dir": tmp_path / "out", "executor": "streaming", "progress": False}
    compress_moe(tmp_path / "model", recipe, calibration=tokens, **where)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_close(constants_of(streamed), constants_of(mone(original("mixtral"), tokens)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"selection": "gated_energy", "keep": 0.25, "keep_experts": 0.5}])
def test_the_plan_counts_the_constants(original, tokens, changes):
    model = original("qwen2_moe")
    planned = plan(model, recipe_from_preset("mone", **changes))
    result = mone(model, tokens, **changes)
    sizes, report = measure(result, find_layers(result)), result.compression_report
    assert planned.total_parameters_after == sizes.total_parameters == report.total_parameters_after
    assert planned.expert_bytes_after == sizes.expert_bytes == sum(layer.bytes_after for layer in report.layers)
    assert planned.total_bytes_after == sizes.total_bytes
    assert sum(p.numel() for p in constants_of(result).values()) == 3 * 4 * model.config.hidden_size


def test_constants_beside_experts_of_other_forms(original, tokens, prompt):
    for changes in (
        {"decomposition": "low_rank_sparse", "decomposition_options": {"rank": 12, "keep_rows": 0.25}},
        {"selection": "gated_energy", "keep": 0.49, "keep_experts": 0.5},
    ):
        result = mone(original("qwen3_moe"), tokens, **changes)
        assert form_layers(result) and constants_of(result)
        expected = logits(result, prompt)
        densify(result)
        assert not form_layers(result) and constants_of(result)
        assert_close(logits(result, prompt), expected, **ROUNDING)


def test_a_refit_gives_what_the_constants_leave(original):
    tokens = torch.randint(3, 150, (200, 20), generator=torch.Generator().manual_seed(5))
    plain = mone(original("mixtral"), tokens)
    fitted = mone(original("mixtral"), tokens, refit="least_squares")
    assert all(
        layer.relative_error < 0.99 * plain.compression_report.layers[place].relative_error
        for place, layer in enumerate(fitted.compression_report.layers)
    )
    for before, after in zip(plain.compression_report.layers, fitted.compression_report.layers, strict=True):
        # Its own view of the error, on what constants leave, is that of the layer's whole output.
        missed = after.refit_error_after / after.refit_error_before
        assert after.relative_error / before.relative_error == pytest.approx(missed, rel=1e-3)


def test_lora_leaves_the_constants_alone_and_training_reaches_them(original, tokens, prompt):
    model = mone(original("qwen3_moe"), tokens)
    before = constants_of(model)
    model(input_ids=prompt, labels=prompt).loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("vectors"))
    model.zero_grad()
    adapted = get_peft_model(model, lora_config(model, r=2))
    assert not any("constant_outputs" in name for name, p in adapted.named_parameters() if p.requires_grad)
    adapted(input_ids=prompt, labels=prompt).loss.backward()
    assert_close(constants_of(adapted.merge_and_unload()), before, rtol=0, atol=0)


def test_gradient_checkpointing_changes_nothing(original, tokens, prompt):
    model = mone(original("mixtral"), tokens)
    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
        trained(input_ids=prompt, labels=prompt).loss.backward()
        gradients.append([p.grad for name, p in trained.named_parameters() if name.endswith("vectors")])
    assert_close(*gradients)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layout": "native"}, r"constants is 'routed_mean', but layout 'native'.*Use layout='mapped'"),
        (
            {"grouping": "dominant_experts", "similarity": "router_logits"},
            r"grouping 'dominant_experts' has no slots of dropped experts",
        ),
        ({"matching": "adam", "matching_options": {"router": True}}, r"matching trains the router.*Leave one"),
    ],
)
def test_recipes_without_dropped_slots_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MergedSparseMoeConfig.from_preset("mone", **changes)


def test_experts_that_are_not_called_with_slots_are_refused(original, tokens):
    model = original("switch_transformers")
    model.forward = None
    with pytest.raises(
        ValueError, match=r"constants is 'routed_mean', but the experts of .* are not called with slots"
    ):
        compress_moe(model, "mone", calibration=tokens, progress=False)
