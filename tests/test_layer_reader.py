"""The next decoder layer is read in a thread: the same tensors, no more than one ahead, and its errors come up."""

import os
import threading

import pytest
import torch
from checkpoints import content, tensors

from hf_mcsmoe.executors.layer_reader import LayerReader
from hf_mcsmoe.executors.shards import Shards

CPU = torch.device("cpu")


@pytest.fixture
def shards(own_checkpoint):
    return Shards(own_checkpoint)


def test_what_is_taken_is_what_is_stored_whether_it_was_asked_for_or_not(own_checkpoint, shards):
    reader, stored = LayerReader(shards, CPU), tensors(own_checkpoint)
    names = sorted(stored)
    reader.ask(names[:5])
    for some in (names[:5], names[5:8], names[8:], []):  # the first was asked for
        found = reader.take(some)
        assert sorted(found) == some and all(torch.equal(found[name], stored[name]) for name in some)
        assert all(found[name].dtype == stored[name].dtype for name in some)
    reader.close()


def test_reading_ahead_is_done_once_in_a_thread_and_what_is_not_taken_is_forgotten(shards, monkeypatch):
    calls, read = [], shards.read
    monkeypatch.setattr(shards, "read", lambda names: calls.append((names, threading.current_thread())) or read(names))
    reader, names = LayerReader(shards, CPU), sorted(shards.tensors)
    reader.ask(names[:2])
    reader.take(names[:2])
    assert [call[0] for call in calls] == [names[:2]] and calls[0][1] is not threading.main_thread()
    reader.ask(names[2:4])
    assert list(reader.take(names[4:6])) == names[4:6] and reader.asked is None
    assert calls[-1] == (names[4:6], threading.main_thread()) or calls[-1][0] == names[2:4]
    reader.close()


def test_an_error_of_the_thread_comes_up_where_the_tensors_are_taken(shards):
    reader, names = LayerReader(shards, CPU), sorted(shards.tensors)
    file = shards.tensors[names[0]].file
    os.utime(file, ns=(1, 1))
    reader.ask(names[:1])
    with pytest.raises(ValueError, match="was changed while the model was being compressed"):
        reader.take(names[:1])
    reader.close()


@pytest.mark.parametrize("changes", [{}, {"allocation": "global_usage", "refit": "least_squares"}])
def test_reading_ahead_changes_no_byte(changes, checkpoint, stream, tmp_path, monkeypatch):
    folder = checkpoint("deepseek_v3")
    stream(folder, output="ahead", **changes)
    monkeypatch.setattr(LayerReader, "ask", lambda reader, names: None)  # noqa: ARG005
    stream(folder, output="alone", **changes)
    assert content(tmp_path / "ahead") == content(tmp_path / "alone")
