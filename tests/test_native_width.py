"""Experts of one smaller width in a plain model: which field says it, and that nothing else changes."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.native_width import adopt_native, native_fields, width_fields
from hf_mcsmoe.planning import plan

FIT = {"selection": "gated_obs", "refit": "least_squares"}
FIELD_OF = {
    "qwen3_moe": "moe_intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "gemma4_text": "moe_intermediate_size",
    "nemotron_h": "moe_intermediate_size",
    "mixtral": "intermediate_size",
    "olmoe": "intermediate_size",
    "gpt_oss": "intermediate_size",
    "granitemoe": "intermediate_size",
}
SAME_FIELD_ELSEWHERE = ("deepseek_v3", "glm4_moe", "switch_transformers")  # shared experts or dense layers say it too


def fit(model, tokens, **recipe):
    return compress_moe(model, Recipe(layout="native", **FIT, **recipe), calibration=tokens, progress=False)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("model_type", FIELD_OF)
def test_the_field_is_found_without_changing_the_model(model_type, original):
    model = original(model_type)
    before = model.config.to_dict()
    layers = find_layers(model)
    assert width_fields(model, layers, 8) == [("", FIELD_OF[model_type])]
    assert width_fields(model, layers, layers[0].intermediate_size) == []
    assert model.config.to_dict() == before


@pytest.mark.parametrize("model_type", FIELD_OF)
def test_a_narrow_model_is_plain_and_loads_without_us(model_type, original, tokens, prompt, tmp_path):
    model = original(model_type)
    layer = find_layers(model)[0]
    old, width = layer.intermediate_size, 8 if layer.intermediate_size == 24 else 16
    others = {n: p.shape for n, p in model.named_parameters() if ".experts." not in n}
    before = model.config.to_dict()
    result = fit(model, tokens, keep=0.4)
    assert type(result).__module__.startswith("transformers.") and not hasattr(result.config, "merged_sparse_moe")
    changed = {n for n, value in result.config.to_dict().items() if before.get(n) != value}
    assert changed == {FIELD_OF[model_type]} and getattr(result.config, FIELD_OF[model_type]) == width < old
    assert {n: p.shape for n, p in result.named_parameters() if ".experts." not in n} == others
    assert all(entry.widths == [width] * 8 for entry in result.compression_report.layers)
    for found in find_layers(result):
        assert found.intermediate_size == width
        numbers = {n: v for n, v in vars(found.experts).items() if "interm" in n or n.endswith("_dim")}
        assert old not in numbers.values()
    result.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(result) and not any(info[kind] for kind in ("missing_keys", "unexpected_keys"))
    for implementation in ("eager", "grouped_mm"):
        again.set_experts_implementation(implementation)
        result.set_experts_implementation(implementation)
        assert torch.equal(logits(again, prompt), logits(result, prompt))


def test_fewer_and_narrower_experts_in_one_model(original, tokens, prompt, tmp_path):
    result = fit(original("qwen3_moe"), tokens, keep=0.4, keep_experts=0.75)
    assert result.config.num_experts == 6 and result.config.moe_intermediate_size == 16
    assert all(layer.router.weight.shape == (6, 32) for layer in find_layers(result))
    result.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), prompt), logits(result, prompt))


def test_a_narrow_model_can_be_compressed_again(original, tokens, prompt):
    result = fit(fit(original("mixtral"), tokens, keep=0.6), tokens, keep=0.67)
    assert result.config.intermediate_size == 16
    assert logits(result, prompt).isfinite().all()


@pytest.mark.parametrize("changes", [{"keep": 0.4}, {"keep": 0.4, "keep_experts": 0.75}])
@pytest.mark.parametrize("model_type", SAME_FIELD_ELSEWHERE)
def test_a_width_that_the_configuration_cannot_say_is_refused(model_type, changes, original, tokens):
    model = original(model_type)
    before = copy.deepcopy(model.state_dict())
    message = r"^No field of .* says the width .* and nothing else\. Use layout='mapped'"
    with pytest.raises(ValueError, match=message):
        fit(model, tokens, **changes)
    with pytest.raises(ValueError, match=message):
        plan(model, Recipe(layout="native", **FIT, **changes))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_width_that_other_matrices_share_by_chance_does_not_matter(original, tokens):
    # Dense layers, heads and shared experts as wide as the experts, by fields of their own.
    model = original("qwen2_moe", intermediate_size=24, shared_expert_intermediate_size=24)
    result = fit(model, tokens, keep=0.4)
    assert result.config.moe_intermediate_size == 8
    assert result.config.shared_expert_intermediate_size == result.config.intermediate_size == 24


def test_native_widths_leave_no_layer_out(original, tokens):
    with pytest.raises(ValueError, match=r"narrows the experts of all layers\. Use layout='mapped'"):
        fit(original("qwen3_moe"), tokens, exclude_layers=["model.layers.0.*"])


def test_layers_of_different_widths_are_refused(original):
    model = original("qwen3_moe")
    kept = find_layers(model)
    wide = find_layers(original("qwen3_moe", moe_intermediate_size=32))
    with pytest.raises(ValueError, match=r"needs experts of one width, but those of .* are not 24 wide"):
        width_fields(model, [kept[0], wide[1]], 8)


def test_nothing_is_written_where_the_width_stays(original):
    model = original("qwen3_moe")
    layers, before = find_layers(model), model.config.to_dict()
    fields = native_fields(model, layers, [], 8, 24)
    assert fields.width_fields == []
    adopt_native(model, layers, fields, 8, 24)
    assert model.config.to_dict() == before


def test_neurons_of_a_layer_are_rounded_half_up_and_native_widths_to_what_kernels_take():
    def neurons(keep, width=24, num_experts=8, kept=None, **recipe):
        return Recipe(keep=keep, **FIT, **recipe).neurons_per_layer(num_experts, width, kept or num_experts)

    assert neurons(0.5) == 96 and neurons(0.3) == 58 and neurons(0.001) == 1 and neurons(1.0) == 192
    assert neurons(0.5, kept=2) == 48  # no more than they have
    assert neurons(0.5, layout="native") == 8 * 16 and neurons(0.4, layout="native") == 8 * 8
    assert neurons(0.01, layout="native") == 8 * 8 and neurons(0.5, 768, layout="native") == 8 * 384
    assert neurons(0.3, 768, layout="native") == 8 * 232 and neurons(0.5, 20, layout="native") == 8 * 12
    assert neurons(0.4, 21, layout="native") == 8 * 8 and neurons(0.5, 24, kept=4, layout="native") == 4 * 24
    assert Recipe(keep=0.5).neurons_per_layer(8, 24, 3) == 72
