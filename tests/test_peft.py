"""LoRA on compressed models: what is adapted, and that adapters survive disk, merging and every form of experts."""

import copy

import pytest
import torch
from all_families import tiny
from peft import PeftModel, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from hf_mcsmoe.decompose import decompose_merged
from hf_mcsmoe.expert_values import PackedExperts
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.forms.ragged import RaggedExperts
from hf_mcsmoe.training.lora import endings, lora_config

FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h", "gemma4_text", "switch_transformers")


def make_ragged(model):
    """Take every fifth neuron out, other ones in each expert, so that widths differ."""
    for layer in find_layers(model):
        stacked = layer.family.stack(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
        packed = PackedExperts.from_dense(layer.family.view(layer, stacked))
        neurons = torch.arange(len(packed.up))
        layout = RaggedExperts.install(layer, packed.select_neurons(neurons[neurons % 5 != 0]))
        model.config.merged_sparse_moe["layers"][layer.name] |= layout


FORMS = {
    "dense": lambda model: model,
    "low_rank_sparse": lambda model: decompose_merged(model, rank=4, keep_rows=0.2, progress=False),
    "ragged": make_ragged,
}


def inputs_of(prompt):
    return {"input_ids": prompt, "labels": prompt}


@torch.no_grad()
def logits_of(model, prompt):
    return model.eval()(**inputs_of(prompt)).logits


def maps_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("expert_map.index")}


def adapted(model, prompt, **options):
    """`model` with adapters that two steps of training have moved away from zero."""
    peft_model = get_peft_model(model, lora_config(model, r=3, **options)).train()
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        peft_model(**inputs_of(prompt)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft_model


def auto_class_of(model_type):
    return AutoModelForSeq2SeqLM if model_type == "switch_transformers" else AutoModelForCausalLM


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_adapter_survives_disk_and_merging(compress, tmp_path, prompt, model_type, form):
    model = compress(model_type, num_experts=3)
    FORMS[form](model)
    model.save_pretrained(tmp_path / "compressed")
    before, maps = logits_of(model, prompt), maps_of(model)
    peft_model = adapted(model, prompt)
    expected = logits_of(peft_model, prompt)
    assert (expected - before).abs().max() > 1e-3
    peft_model.save_pretrained(tmp_path / "adapter")

    base = auto_class_of(model_type).from_pretrained(tmp_path / "compressed")
    assert torch.equal(logits_of(base, prompt), before)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, prompt), expected)

    merged = loaded.merge_and_unload()
    assert torch.allclose(logits_of(merged, prompt), expected, atol=2e-5)
    assert type(merged) is type(model) and maps
    assert all(torch.equal(index, maps[name]) for name, index in maps_of(merged).items())
    merged.save_pretrained(tmp_path / "merged")
    again = auto_class_of(model_type).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again, prompt), logits_of(merged, prompt))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_each_expert_gets_a_pair_of_its_own(compress, prompt, model_type):
    peft_model = adapted(compress(model_type, num_experts=3), prompt)
    wrappers = {n: m for n, m in peft_model.named_modules() if type(m).__name__ == "ParamWrapper"}
    expected = {}
    for name, wrapper in wrappers.items():
        experts = wrapper.get_base_layer()
        weight = getattr(experts, wrapper.parameter_name).detach().clone()
        a, b = wrapper.lora_A["default"].weight.detach(), wrapper.lora_B["default"].weight.detach()
        num_experts = len(weight)
        for expert in range(num_experts):
            change = 2 * b[:, expert::num_experts] @ a[3 * expert : 3 * expert + 3]  # alpha / r = 2
            weight[expert] += change.T if model_type == "gpt_oss" else change
        expected[name.partition(".experts")[0].removeprefix("base_model.model."), wrapper.parameter_name] = weight
    merged = peft_model.merge_and_unload()
    assert len(expected) == 2 * 3
    for (block, parameter), weight in expected.items():
        torch.testing.assert_close(merged.get_parameter(f"{block}.experts.{parameter}"), weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_only_adapters_and_routers_are_trained(compress, prompt, model_type, form):
    model = compress(model_type, num_experts=3)
    FORMS[form](model)
    names = [layer for layer in model.config.merged_sparse_moe["layers"]]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_model = adapted(model, prompt)
    trained = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save.default" in name for name in trained)
    for layer in names:
        parent = layer.rpartition(".")[0]
        assert any(name.startswith(f"base_model.model.{layer}.") and "lora_A" in name for name in trained)
        assert any(name.startswith(f"base_model.model.{parent}.") and "modules_to_save" in name for name in trained)
    merged = peft_model.unload()  # without the adapters: what was there before, but for the routers
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("router" in name or ".gate." in name for name in changed)


def test_names_fit_the_model():
    config = lora_config(tiny_model("qwen2_moe"))
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert config.target_parameters == ["down_proj", "gate_up_proj"]
    assert config.modules_to_save == ["mlp.gate"]  # shared_expert_gate ends with "gate" too
    assert (config.r, config.lora_alpha) == (8, 16)


@pytest.mark.parametrize("model_type", ["nemotron_h", "glm4_moe"])
def test_attention_is_found_by_path_or_class(model_type):
    config = lora_config(tiny_model(model_type), experts=False)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}  # not the Mamba or dense layers


def test_gates_of_attention_are_not_taken_for_experts():
    model = copy.deepcopy(tiny("afmoe"))
    assert any(name.endswith("self_attn.gate_proj") for name, _ in model.named_modules())
    config = lora_config(model)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    get_peft_model(model, config)  # PEFT would look for the other half of an expert


@pytest.mark.parametrize(
    "form, expected",
    [
        ("low_rank_sparse", [f"{matrix}_{side}" for matrix in ("down", "gate", "up") for side in ("left", "right")]),
        ("ragged", ["down", "gate", "up"]),
    ],
)
def test_parameters_of_a_form(compress, form, expected):
    model = compress("gpt_oss", num_experts=3)  # has biases, which are left alone
    FORMS[form](model)
    config = lora_config(model)
    assert config.target_parameters == expected
    assert config.modules_to_save == ["router"]


def test_experts_that_are_linear_layers_are_modules():
    config = lora_config(tiny_model("switch_transformers"), attention=False)
    assert config.target_parameters is None
    model = get_peft_model(tiny_model("switch_transformers"), config)
    adapted_layers = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert len(adapted_layers) == 4 * 8 * 2  # layers, experts, matrices
    assert all(".experts.expert_" in name for name in adapted_layers)


def test_switches_and_further_fields():
    model = tiny_model("qwen3_moe")
    config = lora_config(model, experts=False, routers=False, lora_dropout=0.1, target_modules=["lm_head"])
    assert config.target_parameters is None and config.modules_to_save is None
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    config = lora_config(model, attention=False, lora_alpha=5, modules_to_save=["lm_head"])
    assert config.target_modules == set() and config.lora_alpha == 5
    assert config.modules_to_save == ["gate", "lm_head"]


def test_what_cannot_be_done_is_refused():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layer"):
        lora_config(llama)
    with pytest.raises(ValueError, match="attention and experts are both False"):
        lora_config(tiny_model("qwen3_moe"), attention=False, experts=False)
    with pytest.raises(ValueError, match=r"lora_dropout is 0\.1, but PEFT cannot"):
        lora_config(tiny_model("qwen3_moe"), lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"transformer\.blocks\.0\.ffn\.experts' are flat matrices"):
        lora_config(tiny("dbrx"))
    assert lora_config(tiny("dbrx"), experts=False).target_parameters is None


def test_router_logits_are_still_recorded(compress, prompt):
    model = compress("qwen3_moe", num_experts=3)
    expected = model(**inputs_of(prompt), output_router_logits=True)
    peft_model = get_peft_model(model, lora_config(model))
    outputs = peft_model(**inputs_of(prompt), output_router_logits=True)
    assert len(outputs.router_logits) == 3 and outputs.aux_loss == expected.aux_loss
    assert all(torch.equal(*pair) for pair in zip(outputs.router_logits, expected.router_logits, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_no_gradient(compress, prompt, form):
    model = compress("qwen3_moe", num_experts=3)
    FORMS[form](model)
    peft_model = adapted(model, prompt)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            peft_model.gradient_checkpointing_enable()
            peft_model.enable_input_require_grads()
        peft_model(**inputs_of(prompt), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad})
        peft_model.zero_grad()
    assert all(gradient is not None and gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_one_expert_a_layer(compress, prompt):
    peft_model = adapted(compress("qwen3_moe", num_experts=1, allocation="uniform"), prompt)
    expected = logits_of(peft_model, prompt)
    assert torch.allclose(logits_of(peft_model.merge_and_unload(), prompt), expected, atol=2e-5)


def test_the_native_layout_and_an_uncompressed_model(compress, prompt):
    for model in (compress("qwen3_moe", layout="native"), tiny_model("qwen3_moe")):
        peft_model = adapted(model, prompt)
        expected = logits_of(peft_model, prompt)
        assert torch.allclose(logits_of(peft_model.merge_and_unload(), prompt), expected, atol=2e-5)


@pytest.mark.parametrize("form", ["low_rank_sparse", "ragged"])
def test_parameters_of_a_form_have_one_order(compress, tmp_path, form):
    # PEFT names adapters of parameters by it: another order after loading would swap gate and up.
    model = compress("qwen3_moe", num_experts=3)
    FORMS[form](model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_an_endings_is_the_shortest_that_fits_nothing_else():
    names = ["a.0.mlp", "a.0.mlp.gate", "a.0.shared_gate", "b.attn.q", "c.attn.q", "b.attn", "c.attn", "top"]
    assert endings({"a.0.mlp.gate"}, names) == ["mlp.gate"]
    assert endings({"b.attn.q", "c.attn.q"}, names) == ["q"]
    assert endings({"b.attn.q"}, names) == ["b.attn.q"]
    assert endings(set(), names) == []
