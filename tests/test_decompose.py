"""Decomposing the experts of a model that was merged before."""

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hf_mcsmoe.decompose import decompose_merged
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.densify import densify
from hf_mcsmoe.modeling.forms import form_layers


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
    with pytest.raises(ValueError, match="'whitened_low_rank_sparse' reads calibration data"):
        decompose_merged(model, "whitened_low_rank_sparse", rank=2)
    assert not form_layers(model)
    decompose_merged(model, rank=2, progress=False)
    with pytest.raises(ValueError, match="no dense merged experts"):
        decompose_merged(model, rank=2)
