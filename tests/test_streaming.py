import json
import random
import signal
import subprocess
import sys
import textwrap
import time
from itertools import count

import pytest
import torch
from checkpoints import Killed, content, same_tensors, tensors, texts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.executors.hidden_states import HiddenStates
from hf_mcsmoe.executors.journal import JOURNAL_FILE, Journal
from hf_mcsmoe.executors.output_shards import OutputShards
from hf_mcsmoe.executors.streaming_model import StreamedModel

FAMILIES = (
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "gemma4_text",
    "granitemoe",
    "olmoe",
    "nemotron_h",
)
RECIPES = {
    "mapped-uniform": {"layout": "mapped"},
    "mapped-global": {"layout": "mapped", "allocation": "global_usage"},
    "native": {"layout": "native"},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_streaming_gives_what_compressing_in_memory_gives(model_type, recipe, checkpoint, stream, tokens, tmp_path):
    folder = checkpoint(model_type)
    assert len(list(folder.glob("*.safetensors"))) > 1
    result = stream(folder, **recipe)
    assert result.streaming_summary.passes == (2 if recipe.get("allocation") else 1)
    compress_moe(
        folder,
        Recipe(**{"allocation": "uniform", **recipe}),
        calibration=tokens,
        output_dir=tmp_path / "whole",
        executor="in_memory",
        progress=False,
    )
    assert same_tensors(tmp_path / "streamed", tmp_path / "whole")
    assert texts(tmp_path / "streamed") == texts(tmp_path / "whole")
    assert not (tmp_path / "streamed.partial").exists()


@pytest.mark.parametrize("layout", ["mapped", "native"])
def test_a_streamed_checkpoint_loads_and_its_index_is_right(layout, checkpoint, stream, prompt, tmp_path):
    result = stream(checkpoint("qwen3_moe"), layout=layout)
    assert next(result.parameters()).is_meta and result.compression_report.layers
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model(prompt).logits.isfinite().all()
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    stored = tensors(tmp_path / "streamed")
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "streamed" / file)


def test_padding_and_a_budget_for_hidden_states_do_not_matter(checkpoint, tokens, tmp_path):
    mask = torch.ones_like(tokens)
    mask[::3, :7] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    for name, budget in (("none", 0), ("some", 5000), ("all", 2**20)):
        compress_moe(
            checkpoint("gpt_oss"),
            Recipe(),
            calibration=batch,
            output_dir=tmp_path / name,
            hidden_states_bytes=budget,
            executor="streaming",
            progress=False,
        )
    assert content(tmp_path / "none") == content(tmp_path / "some") == content(tmp_path / "all")


def test_hidden_states_come_back_from_file_and_from_memory(tmp_path):
    batches = [torch.randn(2, 3, 4).bfloat16(), torch.randn(1, 5, 4).bfloat16()]
    states = HiddenStates(tmp_path, in_memory_bytes=50)  # the first batch has 48 bytes
    with states.written(0) as writer:
        for batch in batches:
            writer.append(batch)
    again = HiddenStates(tmp_path, in_memory_bytes=50)
    again.restore(json.loads(json.dumps(states.record)))
    for position, batch in enumerate(batches):
        assert torch.equal(states.read(position), batch)
        assert torch.equal(again.read(position), batch)


SLOW = pytest.mark.slow
STEPS = {
    "journal": (Journal, "append"),
    "write": (OutputShards, "write"),
    "finish": (OutputShards, "finish"),
    "forward": (StreamedModel, "observe"),
}


@pytest.mark.parametrize("place", [1, pytest.param(0, marks=SLOW), pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("recipe", [RECIPES["mapped-global"], pytest.param(RECIPES["native"], marks=SLOW)])
def test_a_run_that_died_at_any_step_goes_on_to_the_same_bytes(
    recipe, step, place, checkpoint, stream, monkeypatch, tmp_path
):
    folder = checkpoint("deepseek_v3")
    stream(folder, output="expected", **recipe)
    owner, name = STEPS[step]
    original, calls = getattr(owner, name), count()

    def dying(*args, **kwargs):
        if next(calls) == (0 if step == "finish" else place):
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)
    with pytest.raises(Killed):
        stream(folder, **recipe)
    assert not (tmp_path / "streamed").exists()
    monkeypatch.setattr(owner, name, original)
    lines = (tmp_path / "streamed.partial" / JOURNAL_FILE).read_text().splitlines()
    visits = [json.loads(line)["step"] in ("statistics", "layer") for line in lines]
    # What comes before the visits is written down too.
    assert sum(visits) >= (place - 2 if step == "journal" else place)
    assert stream(folder, **recipe).streaming_summary.resumed_visits == sum(visits)
    assert content(tmp_path / "streamed") == content(tmp_path / "expected")
    assert texts(tmp_path / "streamed") == texts(tmp_path / "expected")


KILLS = 4


def kill_until_done(command, journal, kills):
    """Start a command again and again, killing it soon after its next finished step; returns how often it was."""
    generator, killed = random.Random(0), 0
    while True:
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        before = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        while process.poll() is None:
            time.sleep(0.001)
            if killed < kills and journal.exists() and len(journal.read_bytes().splitlines()) > before:
                time.sleep(generator.uniform(0, 0.03))
                process.send_signal(signal.SIGKILL)
                killed += process.wait() == -signal.SIGKILL
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0
            return killed


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        {"allocation": "uniform"},
        {"allocation": "global_usage", "refit": "least_squares"},
        {"allocation": "uniform", "sequential": True},
    ],
)
def test_killed_by_sigkill_it_goes_on_to_the_same_bytes(recipe, checkpoint, stream, tmp_path):
    script = f"""
        import sys, torch
        torch.set_num_threads(1)
        from hf_mcsmoe import Recipe, compress_moe
        tokens = torch.randint(3, 150, (24, 20), generator=torch.Generator().manual_seed(0))
        compress_moe(sys.argv[1], Recipe(**{recipe!r}), calibration=tokens, output_dir=sys.argv[2],
                     progress=False, overwrite=True, executor="streaming")
    """
    folder = checkpoint("deepseek_v3")
    stream(folder, output="expected", **recipe)
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), folder, tmp_path / "streamed"]
    assert kill_until_done(command, tmp_path / "streamed.partial" / JOURNAL_FILE, kills=KILLS) == KILLS
    assert content(tmp_path / "streamed") == content(tmp_path / "expected")
    assert not (tmp_path / "streamed.partial").exists()
