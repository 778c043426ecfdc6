import json

import pytest
import torch
from checkpoints import same_tensors, texts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_mcsmoe import compress_moe
from hf_mcsmoe.recipe_reading import recipe_from_preset

LARGEST_FP8 = 448.0
TOKENS = torch.randint(3, 150, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory):
    """A checkpoint as DeepSeek-V3 publishes them: float8 matrices, each with the scales of its blocks."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("fp8")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    packed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        packed[name] = tensor
        if tensor.dim() == 2 and name.endswith("_proj.weight"):
            scale = tensor.float().abs().max() / LARGEST_FP8
            packed[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            packed[name.replace(".weight", ".weight_scale_inv")] = scale.reshape(1, 1)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("layout", ["mapped", "native"])
def test_an_fp8_checkpoint_is_unpacked_compressed_in_bfloat16_and_the_report_says_so(fp8_folder, tmp_path, layout):
    recipe = recipe_from_preset("m-smoe", keep=0.5, layout=layout)
    where = {"output_dir": tmp_path / "out", "executor": "in_memory"}
    model = compress_moe(fp8_folder, recipe, calibration=TOKENS, progress=False, **where)
    assert any("was quantized (fp8)" in line for line in model.compression_report.warnings)
    assert any("was quantized (fp8)" in line for line in json.loads(report_text(tmp_path / "out"))["warnings"])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for name, t in stored.items() if not name.endswith("expert_map.index")} == {torch.bfloat16}
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(reloaded(TOKENS).logits, model(TOKENS).logits)


def test_an_expert_that_stays_alone_has_the_unpacked_weights(fp8_folder):
    recipe = recipe_from_preset("frequency", keep=0.5, layout="mapped", allocation="uniform")
    model = compress_moe(fp8_folder, recipe, calibration=TOKENS, progress=False)
    packed = load_file(fp8_folder / "model.safetensors")
    for number, layer in enumerate(model.compression_report.layers):
        experts = model.get_submodule(layer.layer)
        for group, expert in enumerate(layer.dominant_of_group):
            name = f"model.layers.{number}.mlp.experts.{expert}.down_proj"
            expected = packed[f"{name}.weight"].float() * packed[f"{name}.weight_scale_inv"]
            torch.testing.assert_close(experts.down_proj[group].float(), expected, rtol=2**-8, atol=0)


@pytest.fixture(scope="module")
def blocks_folder(fp8_folder, tmp_path_factory):
    """The same with matrices of several blocks, whose scales differ, in several shards."""
    folder = tmp_path_factory.mktemp("blocks")
    config = Qwen3MoeConfig.from_pretrained(fp8_folder, hidden_size=256, moe_intermediate_size=128)
    del config.quantization_config
    torch.manual_seed(1)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    packed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        packed[name] = tensor
        if tensor.dim() == 2 and name.endswith("_proj.weight"):
            height, width = (min(size, 128) for size in tensor.shape)
            blocks = tensor.float().reshape(-1, height, tensor.shape[1] // width, width)
            scales = blocks.abs().amax((1, 3)) / LARGEST_FP8
            packed[name] = (blocks / scales[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
            packed[name.replace(".weight", ".weight_scale_inv")] = scales
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(sorted(packed)):
        weight_map[name] = f"model-{number % 3 + 1:05d}-of-00003.safetensors"
    for file in set(weight_map.values()):
        part = {name: packed[name].contiguous() for name in packed if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = json.loads((fp8_folder / "config.json").read_text())["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("recipe", [{}, {"layout": "native"}, {"refit": "least_squares", "allocation": "uniform"}])
def test_streaming_unpacks_layer_by_layer_to_the_same_bytes(blocks_folder, tmp_path, recipe, monkeypatch):
    for executor in ("in_memory", "streaming"):
        how = {"calibration": TOKENS, "output_dir": tmp_path / executor, "executor": executor, "progress": False}
        result = compress_moe(blocks_folder, recipe_from_preset("m-smoe", **recipe), **how)
        if executor == "in_memory":  # from here on nothing may be loaded as a whole
            monkeypatch.setattr("hf_mcsmoe.compress.load_model", None)
    assert result.streaming_summary.bytes_read > 0
    assert same_tensors(tmp_path / "in_memory", tmp_path / "streaming")
    assert texts(tmp_path / "in_memory") == texts(tmp_path / "streaming")
    assert any("was quantized (fp8)" in line for line in json.loads(report_text(tmp_path / "streaming"))["warnings"])


def test_a_format_that_cannot_be_unpacked_is_refused_before_any_work(fp8_folder, tmp_path):
    values = json.loads((fp8_folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"quantized \(awq\).*cannot unpack.*bfloat16 checkpoint"):
        compress_moe(tmp_path, calibration=TOKENS)


def test_a_model_with_packed_weights_is_refused_and_told_the_way(fp8_folder):
    model = AutoModelForCausalLM.from_pretrained(fp8_folder)  # unpacked: there is no kernel for FP8 here
    model.quantization_method = "fp8"
    with pytest.raises(ValueError, match=r"model is quantized \(fp8\).*Give compress_moe the path"):
        compress_moe(model, calibration=TOKENS)


def report_text(folder):
    return (folder / "compression_report.json").read_text()
