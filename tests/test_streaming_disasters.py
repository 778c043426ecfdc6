"""Broken bits, full disks and changed inputs at any place: a clear error, or the right result, and nothing between."""

import errno
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoints import Killed, content, texts
from safetensors.torch import load_file, save_file

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.executors import output_shards, streaming_fingerprint, streaming_statistics
from hf_mcsmoe.executors.journal import Journal
from hf_mcsmoe.loading import read_config

TWO_PASSES = {"allocation": "global_usage", "refit": "least_squares"}


@pytest.fixture
def unfinished(own_checkpoint, stream, monkeypatch):
    """A checkpoint whose run died after its first layer."""
    original = Journal.append

    def dying(self, record):
        original(self, record)
        if record["step"] == "layer":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", dying)
        with pytest.raises(Killed):
            stream(own_checkpoint)
    return own_checkpoint


def change_configuration(folder, monkeypatch):  # noqa: ARG001
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    return {}, r"model\.config\.rms_norm_eps was .*, is 0\.5"


def change_weights(folder, monkeypatch):  # noqa: ARG001
    shard = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    next(iter(tensors.values())).mul_(2)
    save_file(tensors, shard, metadata={"format": "pt"})
    return {}, rf"model\.shards\.{shard.name}\.modified was"


def change_version(folder, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr(streaming_fingerprint, "package_version", lambda: "99.0")
    return {}, r"versions\.hf_mcsmoe was .*, is '99\.0'"


def change_transformers(folder, monkeypatch):  # noqa: ARG001
    monkeypatch.setattr(streaming_fingerprint.transformers, "__version__", "99.0")
    return {}, r"versions\.transformers was .*, is '99\.0'"


def change_dtype(folder, monkeypatch):  # noqa: ARG001
    return {"dtype": "float32"}, r"dtype was 'torch\.bfloat16', is 'torch\.float32'"


def change_padding(folder, monkeypatch):  # noqa: ARG001
    return {"batch_size": 5}, r"calibration\.batches was"


def change_seed(folder, monkeypatch):  # noqa: ARG001
    return {"config": Recipe(allocation="uniform", seed=3)}, r"recipe\.seed was not there, is 3"


CHANGES = [value for name, value in list(globals().items()) if name.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_nothing_else_than_it_began_with(change, unfinished, tokens, monkeypatch, tmp_path):
    how = {"config": Recipe(allocation="uniform"), "calibration": tokens, "output_dir": tmp_path / "streamed"}
    before = content(tmp_path / "streamed.partial" / "model")
    given, message = change(unfinished, monkeypatch)
    with pytest.raises(ValueError, match=rf"unfinished run that cannot go on, because something changed: .*{message}"):
        compress_moe(unfinished, **{**how, **given}, progress=False)
    assert before and content(tmp_path / "streamed.partial" / "model") == before
    assert not (tmp_path / "streamed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_single", [False, True])
def test_a_flipped_bit_anywhere_in_a_header_is_an_error_or_changes_nothing(
    is_single, checkpoint, own_checkpoint, stream, tmp_path
):
    folder = own_checkpoint
    if is_single:
        merged = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        for file in folder.glob("model*"):
            file.unlink()
        save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    stream(checkpoint("qwen3_moe"), output="expected")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    sound = shard.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    generator = random.Random(0)
    refused = 0
    for position in [*range(8), *generator.sample(range(8, header), 40)]:
        raw = bytearray(sound)
        raw[position] ^= 1 << generator.randrange(7)
        shard.write_bytes(raw)
        try:
            stream(folder)
        except ValueError as error:
            refused += 1
            assert "ownload" in str(error) or "mean nothing without their scales" in str(error), error
            assert not list(tmp_path.glob("streamed*"))
        else:
            assert content(tmp_path / "streamed") == content(tmp_path / "expected")
            shutil.rmtree(tmp_path / "streamed")
    assert refused > 40


def refuse_write(owner, name, monkeypatch, *, after):
    """Let `after` calls of a function that writes pass, then let it fail as on a full disk."""
    original, left = getattr(owner, name), [after]

    def full(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)


WRITES = {
    "shard": (output_shards, "save_file", 1),
    "statistics": (streaming_statistics, "write_layer", 1),
    "saliency": (streaming_statistics, "save_file", 0),
    "journal": (Journal, "append", 4),
    "report": (output_shards, "write_report", 0),
    "card": (output_shards, "write_card", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_said_wherever_it_strikes(write, checkpoint, stream, monkeypatch, tmp_path):
    folder = checkpoint("mixtral")
    stream(folder, output="expected", **TWO_PASSES)
    owner, name, after = WRITES[write]
    with monkeypatch.context() as patch:
        refuse_write(owner, name, patch, after=after)
        with pytest.raises(OSError, match=r"is full. The finished layers are kept there: free some space"):
            stream(folder, **TWO_PASSES)
    assert not (tmp_path / "streamed").exists() and not list(tmp_path.glob("streamed.partial/model/*.tmp"))
    stream(folder, **TWO_PASSES)
    assert content(tmp_path / "streamed") == content(tmp_path / "expected")
    assert texts(tmp_path / "streamed") == texts(tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [TWO_PASSES, {"allocation": "uniform", "sequential": True}])
def test_a_disk_that_grows_slowly_lets_a_run_go_on_bit_by_bit(changes, checkpoint, stream, monkeypatch, tmp_path):
    folder, disk = checkpoint("mixtral"), tmp_path / "disk"
    disk.mkdir()
    stream(folder, output="expected", **changes)
    monkeypatch.setattr("hf_mcsmoe.compress.check_free_space", lambda *_: None)
    monkeypatch.setattr("hf_mcsmoe.executors.streaming.has_room_for_tokens", lambda *_: True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    failures = 0
    try:
        for size in range(32, 2048, 24):
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
            try:
                stream(folder, output="disk/streamed", **changes)
            except OSError as error:
                failures += 1
                assert "is full. The finished layers are kept there" in str(error), error
                assert not (disk / "streamed").exists()
            else:
                break
        assert failures > 3
        assert content(disk / "streamed") == content(tmp_path / "expected")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_is_being_written_names_no_model(unfinished, tmp_path):
    working = Path(tmp_path / "streamed.partial")
    assert unfinished.exists() and list(working.glob("model/*.safetensors"))
    for folder in (working, working / "model"):
        assert not (folder / "config.json").exists() and not list(folder.glob("*.index.json"))
        with pytest.raises(OSError):
            read_config(folder)
