import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from checkpoints import Killed, content, same_tensors
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from hf_mcsmoe import Recipe, compress_moe, load_calibration
from hf_mcsmoe.executors.decoder_stack import DecoderStack
from hf_mcsmoe.executors.journal import JOURNAL_FILE, Journal, compare
from hf_mcsmoe.executors.output_shards import OutputShards
from hf_mcsmoe.executors.shards import NotStreamableError, Shards
from hf_mcsmoe.executors.streaming import compress_by_streaming


@pytest.fixture
def unfinished(own_checkpoint, stream, monkeypatch):
    """A checkpoint whose run died after its first layer."""
    original = OutputShards.write

    def dying(self, number, *args):
        if number == 1:
            raise Killed
        return original(self, number, *args)

    monkeypatch.setattr(OutputShards, "write", dying)
    with pytest.raises(Killed):
        stream(own_checkpoint)
    monkeypatch.setattr(OutputShards, "write", original)
    return own_checkpoint


def test_another_recipe_or_other_data_is_refused_with_the_difference(unfinished, stream, tokens, tmp_path):
    with pytest.raises(ValueError, match=r"recipe\.keep was 0\.5, is 0\.25.*delete that folder"):
        stream(unfinished, keep=0.25)
    with pytest.raises(ValueError, match=r"calibration\.sha256 was"):
        stream(unfinished, data=tokens + 1)
    assert len(list((tmp_path / "streamed.partial" / "model").glob("*.safetensors"))) == 1
    assert stream(unfinished).streaming_summary.resumed_visits == 1


def test_a_finished_layer_that_is_gone_is_missed(unfinished, stream, tmp_path):
    next((tmp_path / "streamed.partial" / "model").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="is gone or was changed"):
        stream(unfinished)


def test_a_model_that_changed_between_the_runs_is_refused(unfinished, stream):
    shard = next(unfinished.glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(ValueError, match=rf"model\.shards\.{shard.name}\.modified was"):
        stream(unfinished)


@pytest.mark.usefixtures("unfinished")
def test_an_unfinished_result_is_no_model(tmp_path):
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "streamed.partial" / "model")


def test_a_line_of_the_journal_that_was_cut_short_does_not_count(tmp_path):
    journal = Journal(tmp_path, {"a": 1})
    journal.append({"step": "layer", "layer": 0})
    journal.append({"step": "layer", "layer": 1})
    path = tmp_path / JOURNAL_FILE
    path.write_bytes(path.read_bytes()[:-3])
    assert list(Journal(tmp_path, {"a": 1}).done("layer")) == [0]
    assert compare({"a": {"b": 1}}, {"a": {"c": 2}}) == ["a.b was 1, is not there", "a.c was not there, is 2"]


def damage_truncated(_, shard):
    shard.write_bytes(shard.read_bytes()[:-100])
    return "damaged or cut short"


def damage_header(_, shard):
    raw = bytearray(shard.read_bytes())
    raw[raw.index(b"BF16")] ^= 1
    shard.write_bytes(raw)
    return "damaged or cut short"


def damage_name(_, shard):
    raw = bytearray(shard.read_bytes())
    raw[raw.index(b"model.layers") + 3] ^= 1
    shard.write_bytes(raw)
    return "says that 'model.layers.*but it is not"


def damage_missing(_, shard):
    shard.unlink()
    return f"{shard.name}' is missing"


def damage_index(folder, shard):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.gate.weight"] = shard.name
    path.write_text(json.dumps(index))
    return "says that 'model.layers.9.mlp.gate.weight' is in .* but it is not"


def damage_dtype(_, shard):
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(b'"BF16"', b'"I16" ', 1))
    return "is stored as I16, but .* mean nothing without their scales"


def damage_incomplete(folder, shard):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    lost = next(name for name in index["weight_map"] if name.endswith("experts.3.up_proj.weight"))
    shard = folder / index["weight_map"].pop(lost)
    save_file({k: v for k, v in load_file(shard).items() if k != lost}, shard, metadata={"format": "pt"})
    path.write_text(json.dumps(index))
    return "do not fit its configuration|lacks"


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(damage, own_checkpoint, stream, tmp_path):
    shard = sorted(own_checkpoint.glob("*.safetensors"))[1]
    message = damage(own_checkpoint, shard)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stream(own_checkpoint)
    assert not list(tmp_path.glob("streamed*"))


def test_a_shard_that_changes_during_the_run_is_noticed(own_checkpoint):
    shards = Shards(own_checkpoint)
    name = next(iter(shards.tensors))
    os.utime(shards.tensors[name].file, ns=(0, 0))
    with pytest.raises(ValueError, match="was changed while"), shards.opened([name]):
        pass


def test_weights_that_are_no_safetensors_cannot_be_streamed(own_checkpoint):
    for file in own_checkpoint.glob("model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        Shards(own_checkpoint)
    (own_checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(NotStreamableError, match="no safetensors"):
        Shards(own_checkpoint)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB; skipped where it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_and_the_finished_layers_go_on_when_there_is_space(
    small_disk, checkpoint, stream, tmp_path, monkeypatch
):
    folder = checkpoint("deepseek_v3")
    stream(folder, output="expected")
    monkeypatch.setattr("hf_mcsmoe.compress.check_free_space", lambda *_: None)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(150_000))
    with pytest.raises(OSError, match=r"is full. The finished layers are kept there"):
        stream(folder, output="disk/streamed")
    assert list(small_disk.glob("streamed.partial/model/*.safetensors"))
    assert not list(small_disk.glob("streamed.partial/model/*.tmp")) and not (small_disk / "streamed").exists()
    ballast.unlink()
    assert stream(folder, output="disk/streamed").streaming_summary.resumed_visits > 0
    assert content(small_disk / "streamed") == content(tmp_path / "expected")


@pytest.mark.parametrize("changes", [{"executor": "streaming", "output_dir": None}, {"executor": "disk"}])
def test_an_executor_that_cannot_be_is_refused(changes, checkpoint, tokens, tmp_path):
    given = {"output_dir": tmp_path / "streamed", **changes}
    with pytest.raises(ValueError, match="executor"):
        compress_moe(checkpoint("qwen3_moe"), Recipe(), calibration=tokens, **given)


@pytest.mark.parametrize("reason", ["its weights are quantized", "it brings its own code"])
def test_models_that_are_never_streamed(reason, tokens, tmp_path):
    config = tiny_config("qwen3_moe")
    packed = {"quant_method": "mxfp4"}  # unpacked as a whole, unlike FP8
    setattr(
        config, *(("quantization_config", packed) if "quantized" in reason else ("auto_map", {"AutoModel": "x.Y"}))
    )
    data = load_calibration(tokens)
    with pytest.raises(NotStreamableError, match=reason):
        compress_by_streaming(tmp_path, config, Recipe(), data, tmp_path / "streamed", trust_remote_code=True)


def test_a_run_killed_while_cleaning_up_gives_its_result(checkpoint, stream, monkeypatch, tmp_path):
    def killed(folder, **_):
        if folder.name.endswith(".partial"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("hf_mcsmoe.executors.streaming.shutil.rmtree", killed)
        with pytest.raises(Killed):
            stream(checkpoint("qwen3_moe"))
    before = content(tmp_path / "streamed")
    assert before and (tmp_path / "streamed.partial").exists()
    assert stream(checkpoint("qwen3_moe")).compression_report.layers
    assert content(tmp_path / "streamed") == before and not (tmp_path / "streamed.partial").exists()
    with pytest.raises(FileExistsError):
        stream(checkpoint("qwen3_moe"))


class Meddling(nn.Module):
    """A decoder layer that passes on more than hidden states, in one of the ways that models have."""

    def __init__(self, layer, way):
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, hidden_states, **kwargs):
        output = self.layer(hidden_states, **kwargs)
        if self.way == "second output":
            return output, output
        if self.way == "container":
            kwargs["shared"]["keys"] = output
        return output


@pytest.mark.parametrize("way", ["second output", "container", "nan", "changed"])
def test_a_model_that_passes_on_more_than_hidden_states_is_noticed(way):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Meddling(nn.Linear(4, 4), way) for _ in range(2)])
            self.config = tiny_config("qwen3_moe")

        def forward(self, states):
            shared = {}
            for layer in self.layers:
                extra = {"shared": shared} if way == "container" else {}
                if way == "nan":
                    extra["input"] = states.mean()
                states = layer(states, **extra)
                states = states[0] if isinstance(states, tuple) else states
                states = states + 1 if way == "changed" else states
            return states

    for layer in (model := Stack()).layers:
        layer.layer.forward = lambda x, **_: x
    stack = DecoderStack(model, [SimpleNamespace(name="layers.0.layer"), SimpleNamespace(name="layers.1.layer")])
    with pytest.raises(NotStreamableError):
        for index in range(2):
            with stack.only(index) as run:
                run(torch.zeros(1, 2, 4), states=torch.ones(1, 2, 4))


def test_what_cannot_be_streamed_is_loaded_whole_and_says_so(checkpoint, stream, tmp_path, monkeypatch):
    def refuse(*_):
        raise NotStreamableError("it is an encoder-decoder")

    said = []
    monkeypatch.setattr("hf_mcsmoe.executors.decoder_stack.stack_name", refuse)
    monkeypatch.setattr("hf_mcsmoe.executors.streaming_choice.logger.warning", said.append)
    stream(checkpoint("qwen3_moe"))
    assert len(said) == 1 and "cannot be streamed: it is an encoder-decoder" in said[0]
    monkeypatch.undo()
    stream(checkpoint("qwen3_moe"), output="expected")
    assert same_tensors(tmp_path / "streamed", tmp_path / "expected")
    assert not list(tmp_path.glob("*.partial"))
