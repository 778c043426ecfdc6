"""Experts that are not called with slots and weights: Switch, NLLB-MoE, DBRX, Llama 4, JetMoE; and what is refused."""

import copy
import functools

import pytest
import torch
from safetensors import safe_open
from tiny_models import tiny_model
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    VitPoseBackbone,
)

import hf_mcsmoe.layer.merging
from hf_mcsmoe import Recipe, compress_moe, load_calibration, plan
from hf_mcsmoe.executors.decoder_inputs import decoder_mask, with_decoder_inputs
from hf_mcsmoe.executors.in_memory import collect_statistics
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.types import ExpertGroups

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
LLAMA4_TEXT = {
    **SIZES,
    "num_local_experts": 8,
    "attention_chunk_size": 32,
    "head_dim": 8,
    "intermediate_size_mlp": 40,
    "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
}
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 1}
VISION |= {"image_size": 28, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
CONFIGS = {
    "nllb-moe": {
        "vocab_size": 160,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "num_experts": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    },
    "dbrx": {
        "vocab_size": 160,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "pad_token_id": 0,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "llama4_text": LLAMA4_TEXT,
    "llama4": {"text_config": LLAMA4_TEXT, "vision_config": VISION, "image_token_index": 150},
    "jetmoe": {**SIZES, "num_local_experts": 8, "kv_channels": 8},
}
FAMILIES = ["switch_transformers", *CONFIGS]
NATIVE = [name for name in FAMILIES if name != "jetmoe"]
AUTO_CLASSES = {name: AutoModelForSeq2SeqLM for name in ("switch_transformers", "nllb-moe")}
AUTO_CLASSES["llama4"] = AutoModelForImageTextToText


def auto_class(name):
    return AUTO_CLASSES.get(name, AutoModelForCausalLM)


@functools.cache
def shared_model(name):
    if name == "switch_transformers":
        model = tiny_model(name, expert_capacity=3)  # few, so that some tokens are beyond it
    else:
        config = AutoConfig.for_model(name, **CONFIGS[name])
        model = auto_class(name).from_config(config, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() > 1 or key.endswith("bias"):
                    parameter.normal_(0.0, 0.1, generator=generator)
    return model


def build(name):
    return copy.deepcopy(shared_model(name))


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@torch.no_grad()
def logits(model, ids):
    targets = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **targets).logits


def get_experts(layer):
    return layer.family.stack(layer, {key: p.detach().clone() for key, p in layer.expert_parameters.items()})


def set_experts(layer, stacked):
    for key, value in layer.family.unstack(layer, stacked).items():
        layer.experts.get_parameter(key).data.copy_(value)


def numbers(model):
    return [layer.num_experts for layer in find_layers(model)]


@pytest.mark.parametrize("layout", ["mapped", "native"])
def test_keeping_all_experts_is_bit_identical(name, layout, compress, tokens, prompt):
    if layout == "native" and name not in NATIVE:
        with pytest.raises(ValueError, match="one number of experts for this layer and for the attention experts"):
            compress(build(name), tokens, layout=layout)
        return
    model = compress(build(name), tokens, keep=1.0, layout=layout)
    assert torch.equal(logits(model, prompt), logits(shared_model(name), prompt))
    assert all(report.relative_error == 0 for report in model.compression_report.layers if report.relative_error)


def test_mapped_checkpoints_come_back(name, compress, tokens, prompt, tmp_path):
    planned = plan(build(name), Recipe(keep=0.5))
    model = compress(build(name), tokens, keep=0.5)
    assert len(set(numbers(model))) > 1 and sum(numbers(model)) == 4 * len(numbers(model))
    model.save_pretrained(tmp_path)
    again, info = auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(again) is type(model) and numbers(again) == numbers(model)
    assert torch.equal(logits(again.eval(), prompt), logits(model, prompt))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == planned.total_bytes_after
    assert {key for key in stored if key.endswith("expert_map.index")} == {
        f"{layer.name}.expert_map.index" for layer in find_layers(model)
    }
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    assert torch.equal(again.generate(prompt, **settings), model.generate(prompt, **settings))


@pytest.mark.parametrize("name", NATIVE)
def test_native_checkpoints_are_plain_models(name, compress, tokens, prompt, tmp_path):
    original = build(name)
    model = compress(original, tokens, keep=0.5, layout="native")
    assert type(model) is type(shared_model(name)) and set(numbers(model)) == {4}
    model.save_pretrained(tmp_path)
    again, info = auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again.eval(), prompt), logits(model, prompt))
    planned = plan(shared_model(name), Recipe(keep=0.5, layout="native"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).nbytes for key in file.keys()) == planned.total_bytes_after


def test_planted_copies_merge_without_loss(name, compress, tokens, prompt, monkeypatch):
    model = build(name)
    generator = torch.Generator().manual_seed(3)
    leaders, twins = [0, 2, 4, 7], [1, 3, 5, 6]
    for layer in find_layers(model):
        stacked = get_experts(layer)
        weights = layer.family.view(layer, stacked)
        order = torch.rand(8, weights.width, generator=generator).argsort(dim=1)
        for field, tensor in weights.tensors().items():
            tensor[twins] = tensor[leaders]
            getattr(weights, field).copy_(weights.permute_neurons(order).tensors()[field])
        set_experts(layer, stacked)
    expected = logits(model, prompt)
    assert not torch.allclose(expected, logits(shared_model(name), prompt), **ROUNDING)
    groups = ExpertGroups(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), torch.tensor(leaders))
    monkeypatch.setattr(hf_mcsmoe.layer.merging, "group_experts", lambda *_: (groups, None))
    result = compress(model, tokens, num_experts=4, allocation="uniform", importance="usage_frequency")
    assert_close(logits(result, prompt), expected, **ROUNDING)
    assert all((report.relative_error or 0) < 1e-9 for report in result.compression_report.layers)


def test_gradients_reach_the_merged_experts(name, compress, tokens, prompt):
    model = compress(build(name), tokens, keep=0.5)
    targets = {"decoder_input_ids": prompt} if model.config.is_encoder_decoder else {}
    model(input_ids=prompt, **targets).logits.square().mean().backward()
    for layer in find_layers(model):
        gradients = get_experts_gradients(layer)
        assert all(tensor.abs().sum() > 0 for tensor in gradients.values()), layer.name


def get_experts_gradients(layer):
    gradients = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in layer.expert_parameters.items()}
    return layer.family.stack(layer, gradients)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_collisions_equal_the_original_with_the_merged_experts_in_all_slots(
    name, num_experts, compress, tokens, prompt
):
    result, aliased = compress(build(name), tokens, num_experts=num_experts, allocation="uniform"), build(name)
    for layer, small in zip(find_layers(aliased), find_layers(result), strict=True):
        index = small.experts.expert_map.index
        set_experts(layer, {key: tensor[index] for key, tensor in get_experts(small).items()})
    assert_close(logits(result, prompt), logits(aliased, prompt), **ROUNDING)


@pytest.mark.parametrize("num_experts", [1, 4])
def test_pruned_slots_add_nothing(name, num_experts, compress, tokens, prompt):
    result = compress(build(name), tokens, preset="frequency", num_experts=num_experts)
    zeroed = build(name)
    for layer, small in zip(find_layers(zeroed), find_layers(result), strict=True):
        dropped = small.experts.expert_map.index < 0
        assert dropped.sum() == 8 - small.num_experts
        stacked = get_experts(layer)
        weights = layer.family.view(layer, stacked)
        weights.down[dropped] = 0
        if weights.down_bias is not None:
            weights.down_bias[dropped] = 0
        set_experts(layer, stacked)
    assert_close(logits(result, prompt), logits(zeroed, prompt), **ROUNDING)


def choices_of_rows(layer, rows, router_weight):
    """What each token of one sequence (S, D) is sent to: [[(slot, weight), ...], ...], from the definitions."""
    kind, filled, chosen = type(layer.router).__name__, [0] * 8, []
    for scores in rows @ router_weight.T:
        first, second = scores.argsort(descending=True)[:2].tolist()
        probabilities = scores.softmax(0)
        if kind.startswith("Switch"):
            filled[first] += 1
            is_within = filled[first] <= layer.router.expert_capacity
            chosen.append([(first, probabilities[first])] if is_within else [])
            continue
        share = probabilities[[first, second]] / probabilities[[first, second]].sum()
        if kind.startswith("Llama4"):
            share = scores[[first, second]].sigmoid()
        # NLLB-MoE executes expert 1 for the first choice and expert 0 for the second, whatever they are.
        slots = (1, 0) if kind.startswith("Nllb") else (first, second)
        chosen.append(list(zip(slots, share, strict=True)))
    return chosen


@torch.no_grad()
def test_statistics_match_a_count_token_by_token(name):
    model = build(name)
    lengths = [9, 9, 9] if name == "nllb-moe" else [9, 4, 7]
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 150, (length,), generator=generator).tolist() for length in lengths]
    data = load_calibration(rows, batch_size=3, held_out_fraction=0)
    layers = find_layers(model)
    statistics, _ = collect_statistics(model, layers, data, frozenset({"gate_sum", "logit_gram"}), progress=False)
    seen = {layer.name: [] for layer in layers}
    for layer in layers:
        layer.router.register_forward_pre_hook(lambda _, args, key=layer.name: seen[key].append(args[0]))
    batch = with_decoder_inputs(data.batches[0], model)
    model(**batch.inputs)
    num_beyond = 0
    for layer in layers:
        weight = next(p for p in layer.router.parameters() if p.shape == (8, 32)).detach()
        mask = decoder_mask(batch) if "decoder" in layer.name else batch.token_mask
        hidden = seen[layer.name][0].reshape(*mask.shape, 32)
        count, gates, gram = torch.zeros(8, dtype=torch.int64), torch.zeros(8), torch.zeros(8, 8)
        for sequence, real in zip(hidden, mask, strict=True):
            for token, chosen in enumerate(choices_of_rows(layer, sequence, weight)):
                num_beyond += real[token].item() and not chosen
                for slot, gate in chosen if real[token] else ():
                    count[slot] += 1
                    gates[slot] += gate
            scores = sequence[real] @ weight.T
            gram += scores.T @ scores
        assert statistics[layer.name].num_tokens == sum(lengths)
        assert statistics[layer.name].selection_count.tolist() == count.tolist()
        assert_close(statistics[layer.name]["gate_sum"].float(), gates)
        assert_close(statistics[layer.name]["logit_gram"].float(), gram, rtol=1e-4, atol=1e-4)
    assert num_beyond > 0 or name != "switch_transformers"


def test_the_side_of_the_padding_does_not_matter_for_the_targets():
    model = build("switch_transformers")
    rows = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    right = {"input_ids": rows, "attention_mask": (rows != 0).long()}
    left = {"input_ids": torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])}
    left["attention_mask"] = (left["input_ids"] != 0).long()
    for given in (right, left):
        batch = with_decoder_inputs(load_calibration([given], held_out_fraction=0).batches[0], model)
        assert batch.inputs["decoder_input_ids"].tolist() == [[0, 5, 6, 7], [0, 9, 0, 0]]
        assert decoder_mask(batch).tolist() == [[True] * 4, [True, True, False, False]]


def test_targets_that_are_given_are_used():
    model = build("switch_transformers")
    ids, targets = torch.arange(3, 15).view(2, 6), torch.tensor([[0, 20, 21], [0, 22, 23]])
    data = load_calibration(
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": targets}],
        held_out_fraction=0,
    )
    statistics, _ = collect_statistics(model, find_layers(model), data, frozenset(), progress=False)
    assert {key.split(".")[0]: value.num_tokens for key, value in statistics.items()} == {"encoder": 12, "decoder": 6}


def test_targets_need_a_token_to_start_with():
    model = build("switch_transformers")
    for owner in (model.config, model.generation_config):
        owner.decoder_start_token_id = owner.pad_token_id = None
    batch = load_calibration([[3, 4, 5]], held_out_fraction=0).batches[0]
    with pytest.raises(ValueError, match=r"neither decoder_start_token_id nor pad_token_id.*decoder_input_ids"):
        with_decoder_inputs(batch, model)


def test_the_first_layer_of_switch_can_be_excluded_as_in_the_paper(compress, tokens, prompt, tmp_path):
    model = compress(build("switch_transformers"), tokens, exclude_layers=[0])
    assert numbers(model)[0] == 8 and max(numbers(model)[1:]) < 8
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again.eval(), prompt), logits(model, prompt))


def test_attention_experts_of_jetmoe_stay(compress, tokens):
    model, before = compress(build("jetmoe"), tokens), shared_model("jetmoe").state_dict()
    attention = [key for key in before if "self_attention" in key]
    assert any("input_linear" in key for key in attention)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in attention)


def test_bad_numbers_are_found_by_expert(compress, tokens):
    model = build("switch_transformers")
    model.encoder.block[1].layer[1].mlp.experts["expert_3"].wo.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"wo.weight of 'encoder.*experts' holds NaN or Inf in expert \[3\]"):
        compress(model, tokens)


def test_doge_is_refused(tokens):
    config = AutoConfig.for_model("doge", **SIZES, num_experts=16, is_moe=True)
    message = (
        r"DogeForCausalLM cannot be compressed: 'model\.layers\.0\.mlp' retrieves 16 experts of rank 1 by product"
    )
    with pytest.raises(ValueError, match=message):
        compress_moe(AutoModelForCausalLM.from_config(config), calibration=tokens)


def test_vitpose_is_refused(tokens):
    config = AutoConfig.for_model(
        "vitpose_backbone",
        **{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "num_experts": 4, "part_features": 8},
    )
    with pytest.raises(ValueError, match=r"4 experts that are chosen by the index of a dataset.*there is no router"):
        compress_moe(VitPoseBackbone(config), calibration=tokens)
