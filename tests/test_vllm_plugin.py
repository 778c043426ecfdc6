"""The vLLM plug-in against a fake of vLLM 0.33's registry and transformers backend: no GPU, no kernels of vLLM."""

import importlib
import subprocess
import sys
from pathlib import Path

import fake_vllm
import pytest
import torch
from checkpoints import tensors
from torch.testing import assert_close
from transformers import AutoConfig

from hf_mcsmoe.loading import load_model
from hf_mcsmoe.serving import vllm_plugin

DECOMPOSED = {"decomposition": "low_rank_sparse", "decomposition_options": {"rank": 4, "keep_rows": 0.2}}
RECIPES = {
    "merged": {"keep": 0.4},  # another number of experts in each layer
    "dropped": {"keep": 0.5, "similarity": None, "grouping": "drop", "alignment": None, "merging": None},
    "ragged": {"keep": 0.3, "selection": "gated_obs"},
    "decomposed": {"keep": 0.5, **DECOMPOSED},
}


@pytest.fixture
def registry(monkeypatch):
    return fake_vllm.install(monkeypatch)


def resolve(registry, architecture):
    """What vLLM does with a registered name."""
    module, name = registry.models[architecture].split(":")
    return getattr(importlib.import_module(module), name)


def test_registering_twice_is_registering_once(registry):
    vllm_plugin.register()
    vllm_plugin.register()
    assert dict(registry.models) == {
        "MergedSparseMoeForCausalLM": "hf_mcsmoe.serving.vllm_model:MergedSparseMoeForVllm"
    }


def test_registering_does_not_import_the_model(registry):  # noqa: ARG001
    vllm_plugin.register()
    assert "hf_mcsmoe.serving.vllm_model" not in sys.modules


def test_the_plug_in_of_another_package_under_the_name_stays(registry):
    registry.register_model("MergedSparseMoeForCausalLM", "other:Class")
    vllm_plugin.register()
    assert registry.models["MergedSparseMoeForCausalLM"] == "other:Class"


def test_the_entry_point_names_the_function():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["hf_mcsmoe"].split(":")
    assert getattr(importlib.import_module(module), function) is vllm_plugin.register


@pytest.mark.slow
def test_the_package_does_not_need_vllm():
    loaded = "any(n.startswith('vllm') for n in sys.modules)"
    code = f"import sys, hf_mcsmoe, hf_mcsmoe.serving.vllm_plugin; assert not {loaded}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_a_mapped_checkpoint_gives_its_logits(registry, kind, trust_remote_code, write_compressed, prompt):
    folder = write_compressed("qwen3_moe", **RECIPES[kind])
    vllm_plugin.register()
    config = AutoConfig.from_pretrained(folder)
    model_class = resolve(registry, config.architectures[0])
    model = model_class(
        vllm_config=fake_vllm.fake_config(config, enforce_eager=True, trust_remote_code=trust_remote_code)
    )
    stored = tensors(folder)
    assert model.load_weights(stored.items()) == set(stored)
    expected = load_model(folder)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in stored.items()}
    with torch.no_grad():
        for row in prompt:
            assert_close(model(row), expected(input_ids=row[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_settings_of_vllm_reach_the_model(registry, write_compressed):
    folder = write_compressed("qwen3_moe", keep=0.5)
    vllm_plugin.register()
    config = AutoConfig.from_pretrained(folder)
    model = resolve(registry, config.architectures[0])(vllm_config=fake_vllm.fake_config(config))
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert model.model.layers[0].self_attn.config._written_later


@pytest.mark.parametrize("kind", ["ragged", "decomposed"])
def test_forms_need_eager_mode(registry, kind, write_compressed):
    folder = write_compressed("qwen3_moe", **RECIPES[kind])
    vllm_plugin.register()
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"cannot be compiled\. Use --enforce-eager, or export it: hf-mcsmoe export"):
        resolve(registry, config.architectures[0])(vllm_config=fake_vllm.fake_config(config))
