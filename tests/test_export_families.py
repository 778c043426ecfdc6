"""Export of families that write MoE layers in their own way: what the native layout would have made, bit for bit."""

import copy

import pytest
import torch
from all_families import VOCABULARY, logits, tiny
from checkpoints import same_tensors

from hf_mcsmoe import Recipe, compress_moe, export_checkpoint, load_calibration
from hf_mcsmoe.loading import load_model

IDS = torch.randint(0, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))
DROP = {"similarity": None, "grouping": "drop", "alignment": None, "merging": None}
FAMILIES = (
    "deepseek_v4",  # a table leads tokens to experts
    "longcat_flash",  # rows of the router for experts that give their input back
    "diffusion_gemma",  # encoder and decoder share their experts
    "qwen3_vl_moe_text",  # part of a larger model: it does not generate
    "switch_transformers",  # experts as modules of their own
    "llama4",
)


def compress(key, folder, **recipe):
    model = copy.deepcopy(tiny(key))
    how = {"calibration": load_calibration(IDS), "output_dir": folder, "progress": False}
    torch.manual_seed(0)  # diffusion models start from random tokens
    compress_moe(model, Recipe(keep=0.5, **recipe), **how)
    return folder


@pytest.mark.parametrize("key", [*FAMILIES[:4], *(pytest.param(key, marks=pytest.mark.slow) for key in FAMILIES[4:])])
def test_cut_routers_give_what_the_native_layout_gives(key, tmp_path):
    native = compress(key, tmp_path / "native", layout="native")
    mapped = compress(key, tmp_path / "mapped", allocation="uniform")
    export_checkpoint(mapped, tmp_path / "exported", progress=False)
    assert same_tensors(tmp_path / "exported", native)
    models = [load_model(folder) for folder in (tmp_path / "exported", native)]
    assert type(models[0]) is type(models[1]) and type(models[0]).__module__.startswith("transformers.")
    if key != "switch_transformers":  # it needs the ids of a decoder too
        with torch.no_grad():
            assert torch.equal(*(logits(model, IDS[:2]) for model in models))


def test_a_table_cannot_lead_to_dropped_experts(tmp_path):
    mapped = compress("deepseek_v4", tmp_path / "mapped", allocation="uniform", **DROP)
    with pytest.raises(ValueError, match=r"cannot be exported .*tid2eid.*Use layout='mapped', or merge"):
        export_checkpoint(mapped, tmp_path / "exported", progress=False)
    assert not (tmp_path / "exported").exists()


def test_an_architecture_without_native_layout_is_refused(tmp_path):
    mapped = compress("jetmoe", tmp_path / "mapped", allocation="uniform")
    with pytest.raises(ValueError, match=r"has no such layout: its configuration has one number .* with hf_mcsmoe"):
        export_checkpoint(mapped, tmp_path / "exported", progress=False)
