"""Which families can have experts of other forms than dense, and that each family's own details survive it."""

import copy

import pytest
import torch
from all_families import STANDARD, TINY, logits, named_class, tiny, tiny_config
from form_models import IDS, biases, dense_weights, layout_entry, split

from hf_mcsmoe.expert_values import PackedExperts
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.modeling.forms import check_forms
from hf_mcsmoe.modeling.install_forms import install_low_rank_sparse, install_ragged

REFUSED = {"dbrx", "jetmoe", "llama4", "llama4_text", "longcat_flash"}


def keep_everything(layer, form):
    """Experts of a form that compute what the layer's own do."""
    number = layer.num_slots
    weights, entry = dense_weights(layer, number), layout_entry(layer, number, has_dropped=False)
    if form == "ragged":
        install_ragged(layer, PackedExperts.from_dense(weights), torch.arange(number), entry)
        return
    matrices = {name: t for name, t in weights.tensors().items() if not name.endswith("bias")}
    factors = {name: [split(m, 4, torch.ones(len(m)) > 0) for m in t] for name, t in matrices.items()}
    install_low_rank_sparse(layer, factors, biases(weights), torch.arange(number), entry)


@pytest.mark.parametrize("key", sorted(TINY))
def test_families_with_forms(key):
    with torch.device("meta"):
        model = named_class(TINY[key]["model"])(tiny_config(key))
    for layer in find_layers(model):
        if key in REFUSED:
            with pytest.raises(ValueError, match="exclude_layers"):
                check_forms(layer)
        else:
            check_forms(layer)


@pytest.mark.parametrize("form", ["ragged", "low_rank_sparse"])
@torch.no_grad()
def test_scaled_outputs_of_nllb_stay_scaled(form):
    model = copy.deepcopy(tiny("nllb-moe"))
    ids = IDS.clamp(max=110)
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    for layer in find_layers(model):
        assert layer.experts.moe_token_dropout > 0
        keep_everything(layer, form)
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(set(STANDARD) - REFUSED))
@torch.no_grad()
def test_everything_kept_is_the_original(key):
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = logits(tiny(key), ids)
    for form in ("ragged", "low_rank_sparse"):
        model = copy.deepcopy(tiny(key))
        for layer in find_layers(model):
            keep_everything(layer, form)
        scale = expected.abs().max().item()
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=3e-5 * scale)
