"""The example in the help of every command runs, word for word."""

import inspect
import json
import shlex

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from typer.main import get_command
from typer.testing import CliRunner

from hf_mcsmoe import compress_moe
from hf_mcsmoe.cli import app
from hf_mcsmoe.recipe_reading import recipe_from_preset

ORIGINALS = ("Qwen/Qwen3-30B-A3B", "allenai/OLMoE-1B-7B-0924")
COMPRESSED = ("qwen3-half", "out")
TEXTS = ("texts.jsonl", "held_out.jsonl")
VERBS = sorted(get_command(app).commands)
ELSEWHERE = {"push": "tests/test_hub.py, against a Hub"}
LONG = {"demo", "recover"}  # they train, or take the model that ships
# What the examples leave to the defaults would be too much for a test.
SHORTER = {"recover": ["--max_steps", "2", "--sequence-length", "16"], "compare": ["--keep", "0.5"]}


def example_of(verb):
    """The command in the help of a verb, as words."""
    text = inspect.getdoc(get_command(app).commands[verb].callback)
    _, found, rest = text.partition("Example: hf-mcsmoe ")
    assert found, f"{verb} has no example"
    words = shlex.split(" ".join(rest.partition("\n\n")[0].split()))
    assert words[0] == verb
    return words


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which every name that the examples use is a tiny thing of that kind."""
    folder = tmp_path_factory.mktemp("world")
    special = {"unk_token": "[unk]", "pad_token": "[pad]", "eos_token": "[eos]"}
    words = [*special.values(), *(f"w{number}" for number in range(3, 160))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    ids = torch.randint(3, 160, (len(TEXTS), 48, 64), generator=torch.Generator().manual_seed(0))
    for name, rows in zip(TEXTS, ids.tolist(), strict=True):
        lines = [json.dumps({"text": " ".join(f"w{token}" for token in row)}) for row in rows]
        (folder / name).write_text("\n".join(lines))
    for name in ORIGINALS:
        tiny_model("qwen3_moe").save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in COMPRESSED:
        model = folder / ORIGINALS[0]
        texts = [row["text"] for row in map(json.loads, (folder / TEXTS[0]).read_text().splitlines())]
        recipe = recipe_from_preset("m-smoe", allocation="uniform")  # as an export needs it
        compress_moe(model, recipe, calibration=texts, sequence_length=20, output_dir=folder / name, progress=False)
    return folder


@pytest.mark.parametrize(
    "verb", [pytest.param(v, marks=pytest.mark.slow) if v in LONG else v for v in VERBS if v not in ELSEWHERE]
)
def test_the_example_of_the_help_runs(verb, world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr("typer.launch", lambda *_, **__: 0)  # no browser
    words = example_of(verb)
    for name in (*ORIGINALS, *COMPRESSED, *TEXTS):
        if name in words:
            assert (world / name).exists()
    if "--output" in words and (world / words[words.index("--output") + 1]).exists():
        words.append("--overwrite")
    result = CliRunner().invoke(app, [*words, *SHORTER.get(verb, [])])
    assert result.exit_code == 0, result.output + result.stderr


def test_the_example_of_push_is_the_one_that_runs_against_a_hub():
    assert example_of("push")[1:2] == ["qwen3-half"] and "--private" in example_of("push")
