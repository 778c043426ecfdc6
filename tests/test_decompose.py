"""Decomposing the experts of a model that was merged before."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.decompose import decompose_merged
from hf_mcsmoe.executors.in_memory import collect
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layer.expert_decomposition import decompose_experts
from hf_mcsmoe.modeling.densify import densify
from hf_mcsmoe.modeling.forms import form_layers
from hf_mcsmoe.observation.input_grams import input_grams
from hf_mcsmoe.observation.layer_inputs import relative_error


def matrices_of(model):
    """Canonical matrices of all dense layers, by layer and name."""
    found = {}
    for layer in find_layers(model):
        weights = layer.family.view(layer, layer.family.stack(layer, layer.expert_parameters))
        found[layer.name] = {n: t.detach().clone() for n, t in weights.tensors().items() if not n.endswith("bias")}
    return found


def slow_decomposition(matrix, rank, keep_rows):
    """Truncated SVD, plus the rows of what it misses that are longest."""
    left, scale, right = torch.linalg.svd(matrix.double())
    product = (left[:, :rank] * scale[:rank]) @ right[:rank]
    missed = matrix.double() - product
    longest = sorted(range(len(matrix)), key=lambda row: (-float(missed[row].norm()), row))
    for row in longest[: int(keep_rows * len(matrix) + 0.5)]:
        product[row] += missed[row]
    return product


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h", "switch_transformers"])
def test_matrices_are_those_of_the_formula(compress, model_type):
    model = compress(model_type, num_experts=3, exclude_layers=[0])
    before, maps = matrices_of(model), {n: b.clone() for n, b in model.named_buffers() if n.endswith("map.index")}
    decomposed = decompose_merged(model, rank=3, keep_rows=0.3, progress=False)
    assert decomposed == list(before)[1:] and len(maps) == len(decomposed)
    assert list(form_layers(model)) == decomposed  # the excluded layer is dense still
    densify(model)
    for layer, matrices in matrices_of(model).items():
        for name, stacked in matrices.items():
            for expert, matrix in enumerate(stacked):
                expected = before[layer][name][expert].double()
                if layer in decomposed:
                    expected = slow_decomposition(expected, 3, 0.3)
                torch.testing.assert_close(matrix.double(), expected, atol=1e-5, rtol=0)
    assert all(torch.equal(model.get_buffer(name), index) for name, index in maps.items())


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen3_moe", "switch_transformers"])
def test_all_rows_keep_the_function_and_the_checkpoint(compress, prompt, tmp_path, model_type):
    model = compress(model_type, num_experts=3)
    expected = model(input_ids=prompt, labels=prompt).logits
    decompose_merged(model, rank=2, keep_rows=1.0, progress=False)
    logits = model(input_ids=prompt, labels=prompt).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    auto_class = AutoModelForSeq2SeqLM if model_type == "switch_transformers" else AutoModelForCausalLM
    assert torch.equal(auto_class.from_pretrained(tmp_path)(input_ids=prompt, labels=prompt).logits, logits)


def test_what_cannot_be_decomposed_is_refused(compress):
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM has no dense merged experts"):
        decompose_merged(tiny_model("qwen3_moe"), rank=2)
    with pytest.raises(ValueError, match="no dense merged experts"):
        decompose_merged(compress("qwen3_moe", layout="native"), rank=2)
    model = compress("qwen3_moe")
    with pytest.raises(ValueError, match="has no option 'ranks'"):
        decompose_merged(model, ranks=2)
    with pytest.raises(ValueError, match="Unknown decomposition 'svd'"):
        decompose_merged(model, "svd")
    with pytest.raises(ValueError, match=r"'whitened_low_rank_sparse' minimises .* calibration is None"):
        decompose_merged(model, "whitened_low_rank_sparse", rank=2)
    assert not form_layers(model)
    decompose_merged(model, rank=2, progress=False)
    with pytest.raises(ValueError, match="no dense merged experts"):
        decompose_merged(model, rank=2)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "switch_transformers"])
def test_calibration_makes_outputs_lose_less(compress, tokens, model_type):
    errors = {}
    for rule in ("low_rank_sparse", "whitened_low_rank_sparse"):
        model = compress(model_type, num_experts=3)
        layer, given = find_layers(model)[-1], []
        handle = layer.block.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        model(input_ids=tokens[20:], labels=tokens[20:])
        handle.remove()
        before = output_of(layer, given)
        decompose_merged(model, rule, calibration=tokens[:20], rank=3, keep_rows=0.2, progress=False)
        assert not layer.experts.training and list(form_layers(model))[-1] == layer.name
        errors[rule] = relative_error(before, output_of(layer, given))
    assert 0 < errors["whitened_low_rank_sparse"] < 0.9 * errors["low_rank_sparse"]


def output_of(layer, given):
    """What a block gives for hidden states that it was given, routers included."""
    outputs = [layer.block(hidden_states) for hidden_states in given]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def test_calibration_is_what_the_experts_are_given(compress, tokens):
    # Grams of the same tokens give the same factors, whoever collects them; padding does not count.
    ragged = [row[: 20 - place % 7].tolist() for place, row in enumerate(tokens)]
    model, again = compress("qwen3_moe", num_experts=3), compress("qwen3_moe", num_experts=3)
    layers = find_layers(again)
    data = load_calibration(ragged, batch_size=1, held_out_fraction=0)
    inputs = collect(again, layers, data, frozenset(), calibration_tokens=10_000, progress=False)
    grams = {layer.name: input_grams(layer, inputs[layer.name].calibration) for layer in layers}
    expected = {}
    for layer in layers:
        weights = layer.family.view(layer, layer.family.stack(layer, layer.expert_parameters))
        expected[layer.name] = decompose_experts(weights, "whitened_low_rank_sparse", {"rank": 4}, grams[layer.name])
    decompose_merged(model, "whitened_low_rank_sparse", calibration=ragged, rank=4, progress=False)
    for name, experts in form_layers(model).items():
        for matrix, factors in expected[name][0].items():
            for mine, other in zip(experts.factors(matrix), factors, strict=True):
                torch.testing.assert_close(mine.dense(), other.dense(), atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_leaves_the_model_as_it_was(compress, tokens):
    model = compress("qwen3_moe")
    whitened = {"decomposition": "whitened_low_rank_sparse", "rank": 2}
    refused = {
        "rank is 25, it must be .* from 1 to 24": {"rank": 25},
        "keep_rows is 2, it must be": {"keep_rows": 2, "rank": 2},
        "calibration is None. Give calibration data, or": whitened,
        "vocabulary has 160 tokens": {
            "decomposition": "whitened_low_rank_sparse",
            "rank": 2,
            "calibration": tokens + 1000,
        },
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            decompose_merged(model, **options)
    assert not form_layers(model)
