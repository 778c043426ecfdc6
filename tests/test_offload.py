"""Models that Accelerate keeps on the CPU or on disk: compressed in place, the same as in memory."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.families import find_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*(offloaded modules|current device_map).*:UserWarning")
CPU = torch.device("cpu")


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def hashes(folder: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def on_meta(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}


def device_map(model: PreTrainedModel) -> dict[str, str]:
    """Every second layer on disk, all else on the CPU."""
    base, prefix = model.base_model, model.base_model_prefix
    modules = [f"{prefix}.{name}" for name, _ in base.named_children() if name != "layers"]
    modules += [name for name, _ in model.named_children() if name != prefix]
    layers = {f"{prefix}.layers.{place}": ("cpu", "disk")[place % 2] for place in range(len(base.layers))}
    return {**dict.fromkeys(modules, "cpu"), **layers}


def keep_on_cpu(source: Path, folder: Path) -> PreTrainedModel:  # noqa: ARG001
    return cpu_offload(AutoModelForCausalLM.from_pretrained(source), execution_device=CPU)


def keep_on_disk(source: Path, folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(source)
    disk_offload(model, folder, execution_device=CPU)
    return model


def dispatch(source: Path, folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(source)
    return dispatch_model(model, device_map(model), main_device="cpu", offload_dir=folder)


def load_with_map(source: Path, folder: Path) -> PreTrainedModel:
    places = device_map(AutoModelForCausalLM.from_pretrained(source))
    return AutoModelForCausalLM.from_pretrained(source, device_map=places, offload_folder=folder)


def load_automatically(source: Path, folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        source, device_map="auto", max_memory={"cpu": "120KB"}, offload_folder=folder, offload_buffers=True
    )


WAYS = (keep_on_cpu, keep_on_disk, dispatch, load_with_map, load_automatically)
# Experts that are split on disk or fused; biases and correction biases; tied embeddings.
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4_text")
QUICK = {
    (keep_on_cpu, "deepseek_v3"),
    (keep_on_disk, "gemma4_text"),
    (dispatch, "qwen3_moe"),
    (load_with_map, "gpt_oss"),
    (load_automatically, "deepseek_v3"),
}
CASES = [
    pytest.param(way, model_type, marks=() if (way, model_type) in QUICK else pytest.mark.slow)
    for way in WAYS
    for model_type in FAMILIES
]


@pytest.fixture(scope="module")
def source(original, tmp_path_factory) -> Callable[[str], Path]:
    """`source(model_type)`: the folder of a checkpoint of the original model."""

    @cache
    def save(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        original(model_type).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def in_memory(source, tokens) -> Callable[[str, str], PreTrainedModel]:
    """`in_memory(model_type, layout)`: the same checkpoint compressed in memory. Shared: do not change it."""

    @cache
    def run(model_type: str, layout: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(source(model_type))
        return compress_moe(model, Recipe(layout=layout), calibration=tokens, progress=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("way", "model_type"), CASES)
def test_an_offloaded_model_gives_the_same_result(
    way, model_type, layout, source, in_memory, tokens, prompt, tmp_path
):
    expected, before = in_memory(model_type, layout), hashes(source(model_type))
    model = way(source(model_type), tmp_path / "offload")
    offloaded = on_meta(model)
    assert any("experts" in name for name in offloaded)
    result = compress_moe(
        model, Recipe(layout=layout), calibration=tokens, output_dir=tmp_path / "out", progress=False
    )
    assert torch.equal(logits(result, prompt), logits(expected, prompt))
    assert on_meta(result) == offloaded  # nothing stayed in memory
    for size in ("total_parameters_before", "total_parameters_after", "total_bytes_before", "total_bytes_after"):
        assert getattr(result.compression_report, size) == getattr(expected.compression_report, size), size
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(reloaded, prompt), logits(expected, prompt))
    assert hashes(source(model_type)) == before


@pytest.mark.parametrize("way", [keep_on_cpu, keep_on_disk, dispatch])
def test_hooks_can_be_removed_afterwards(way, layout, source, in_memory, tokens, prompt, tmp_path):
    model = way(source("deepseek_v3"), tmp_path)
    compress_moe(model, Recipe(layout=layout), calibration=tokens, progress=False)
    remove_hook_from_submodules(model)
    assert not on_meta(model)
    assert torch.equal(logits(model, prompt), logits(in_memory("deepseek_v3", layout), prompt))


@pytest.mark.parametrize("way", [keep_on_disk, load_with_map])
def test_no_file_of_the_offload_folder_is_overwritten(way, source, tokens, tmp_path):
    model = way(source("qwen3_moe"), tmp_path)
    before, offloaded = hashes(tmp_path), on_meta(model)
    compress_moe(model, Recipe(), calibration=tokens[:1], progress=False)
    assert on_meta(model) == offloaded  # with one row, so that no forward of held-out tokens put them there
    after = hashes(tmp_path)
    assert {file: after[file] for file in before} == before
    assert len(after) > len(before)  # the merged experts did go to disk


def test_a_checkpoint_read_in_place_needs_no_offload_folder(source, in_memory, tokens, prompt):
    # gpt_oss stores its experts as the model does, so nothing is rewritten on loading.
    places = device_map(AutoModelForCausalLM.from_pretrained(source("gpt_oss")))
    model = AutoModelForCausalLM.from_pretrained(source("gpt_oss"), device_map=places)
    before = hashes(source("gpt_oss"))
    compress_moe(model, Recipe(), calibration=tokens, progress=False)
    assert torch.equal(logits(model, prompt), logits(in_memory("gpt_oss", "mapped"), prompt))
    assert hashes(source("gpt_oss")) == before


def test_a_mapped_checkpoint_can_be_offloaded_and_saved_again(source, in_memory, tokens, prompt, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source("qwen3_moe"))
    compress_moe(model, Recipe(), calibration=tokens, output_dir=tmp_path / "out", progress=False)
    for way in (keep_on_cpu, keep_on_disk, dispatch):
        offloaded = way(tmp_path / "out", tmp_path / way.__name__)
        assert torch.equal(logits(offloaded, prompt), logits(in_memory("qwen3_moe", "mapped"), prompt))
        offloaded.save_pretrained(tmp_path / f"{way.__name__}_again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{way.__name__}_again")
        assert torch.equal(logits(again, prompt), logits(in_memory("qwen3_moe", "mapped"), prompt))


def test_an_excluded_layer_stays_where_it_is(source, tokens, tmp_path):
    model = dispatch(source("qwen3_moe"), tmp_path)
    store = find_layers(model)[1].experts._hf_hook.weights_map
    before = {name: store[name].clone() for name in ("gate_up_proj", "down_proj")}
    compress_moe(model, Recipe(exclude_layers=[1]), calibration=tokens, progress=False)
    assert all(torch.equal(store[name], tensor) for name, tensor in before.items())
