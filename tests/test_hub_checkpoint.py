"""What may go to the Hub: whole checkpoints, valid cards, and nothing that tells about the machine."""

import json
import re
import shutil
from pathlib import Path

import pytest

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.local_paths import public_model, with_public_models, without_paths
from hf_mcsmoe.publishing.checkpoint_files import check_card, checkpoint_files
from hf_mcsmoe.publishing.published import published


@pytest.fixture(scope="module")
def whole(checkpoint, tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "half"
    how = {"calibration": tokens, "progress": False, "executor": "streaming"}
    compress_moe(checkpoint("qwen3_moe"), Recipe(keep=0.5), output_dir=folder, **how)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a mapped checkpoint in shards, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "half"))


def shard(folder):
    return max(folder.glob("*.safetensors"))


def cut_off(folder):
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(content[:-1])


def rename_a_tensor(folder):
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] |= {"lost.weight": shard(folder).name}
    index.write_text(json.dumps(values))


DAMAGES = {
    "cut off": (cut_off, ValueError, r"model-.*safetensors' is damaged or cut off"),
    "no shard": (lambda folder: shard(folder).unlink(), FileNotFoundError, r"has no model-0000\d.*, one of \d files"),
    "no tensor": (rename_a_tensor, ValueError, "has no tensor 'lost.weight'"),
    "no weights": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        FileNotFoundError,
        "has no weights: neither model.safetensors nor model.safetensors.index.json",
    ),
    "no report": (
        lambda folder: (folder / "compression_report.json").unlink(),
        FileNotFoundError,
        "compression_report.json",
    ),
    "no shim": (
        lambda folder: (folder / "modeling_hf_mcsmoe.py").unlink(),
        FileNotFoundError,
        "has no modeling_hf_mcsmoe.py",
    ),
    "half a configuration": (
        lambda folder: (folder / "config.json").write_text("{"),
        ValueError,
        "config.json' is not valid JSON",
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "no '.*config.json'"),
    "no folder": (shutil.rmtree, FileNotFoundError, "There is no folder"),
    "bad card": (lambda folder: (folder / "README.md").write_text("# No metadata"), ValueError, "there is none"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_incomplete_checkpoint_is_refused(folder, name):
    damage, kind, message = DAMAGES[name]
    checkpoint_files(folder)
    damage(folder)
    with pytest.raises(kind, match=message):
        checkpoint_files(folder)


def test_what_is_no_part_of_a_checkpoint_is_left_out(folder):
    before, nothing = checkpoint_files(folder)
    assert nothing == [] and {"config.json", "recipe.yaml", "README.md"} <= before.keys()
    unwanted = {
        ".env",
        ".cache/x",
        "optimizer.pt",
        "training_args.bin",
        "checkpoint-7/config.json",
        "runs/a/b",
        "x.tmp",
    }
    wanted = {"plots/usage.png", ".eval_results/mmlu.yaml", "chat_template.jinja", "modeling_custom.py"}
    for name in unwanted | wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    files, left_out = checkpoint_files(folder)
    assert files.keys() == before.keys() | wanted and set(left_out) == unwanted
    assert all(path == folder / name for name, path in files.items())


@pytest.mark.parametrize(
    "metadata, problem",
    [
        ("tags: [moe, 1]", "it must be a list of strings"),
        ("base_model: /home/me/model", "base_model '/home/me/model' is no id"),
        ("base_model: [a/b, ./c]", "base_model './c' is no id"),
        ("license: other", "license 'other' needs a license_name"),
        ("tags: [moe", "cannot be read"),
    ],
)
def test_a_card_that_the_hub_would_refuse(metadata, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        check_card(f"---\n{metadata}\n---\n# Title\n")
    check_card("---\nlicense: other\nlicense_name: mine\ntags: [moe]\nbase_model: a/b\n---\n# Title\n")


def test_a_model_is_named_by_its_id_or_the_end_of_its_path(tmp_path, monkeypatch):
    assert public_model("lab/Model-7B") == "lab/Model-7B" and public_model("gpt2") == "gpt2"
    assert public_model("/home/me/models/Model-7B/") == "./Model-7B"
    assert public_model("~/models/m") == public_model("../../m") == public_model("C:\\models\\m") == "./m"
    assert public_model("./m") == "./m" and public_model("") == "" and public_model(None) is None
    (tmp_path / "lab" / "Model-7B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_model("lab/Model-7B") == "./Model-7B"  # a folder here, whatever the Hub has


def test_paths_lose_their_folders_and_nothing_else_changes():
    kept = {
        "text": "see https://arxiv.org/abs/2310.01334 and/or <a/b> </s> 1/2, lab/model, ./x, N/A: 3/4",
        "layers": ["model.layers.0.mlp.experts", 3, 0.5, None, True],
        "base_model": "lab/model",
    }
    assert without_paths(kept) == kept
    private = {
        "base_model": "/srv/models/lab/m",
        "warnings": ["read /home/me/data/a.jsonl and '~/b/c.txt'", "at C:\\Users\\me\\x.npy."],
        "calibration": {"source": "file=/data/clients/x.parquet"},
    }
    assert without_paths(private) == {
        "base_model": "./m",
        "warnings": ["read a.jsonl and 'c.txt'", "at x.npy."],
        "calibration": {"source": "file=x.parquet"},
    }


def test_files_of_other_libraries_keep_their_slashes():
    tokenizer = {"eos_token": "/s/s", "chat_template": "/think/x", "model": {"type": "BPE"}, "name_or_path": "/a/b/m"}
    assert with_public_models(tokenizer) == {**tokenizer, "name_or_path": "./m"}
    assert with_public_models([{"_name_or_path": "lab/m", "model": "unigram"}]) == [
        {"_name_or_path": "lab/m", "model": "unigram"}
    ]


def test_secrets_of_a_training_and_a_token_stay_here(folder):
    report = json.loads((folder / "compression_report.json").read_text())
    report["recovery_arguments"] = {"hub_token": "hf_secret", "seed": 3}
    (folder / "compression_report.json").write_text(json.dumps(report))
    files, _ = checkpoint_files(folder)
    written = json.loads(published(files, "me/half")["compression_report.json"])
    assert written["recovery_arguments"] == {"seed": 3}
    published(files, "me/half", "hf_secret")  # it is no longer in there
    (folder / "notes.md").write_text("hf_secret")
    with pytest.raises(ValueError, match=r"notes.md holds your access token"):
        published(checkpoint_files(folder)[0], "me/half", "hf_secret")


def test_files_that_say_nothing_about_the_machine_go_byte_for_byte(folder):
    files, _ = checkpoint_files(folder)
    contents = published(files, "me/half")
    changed = {name for name, content in contents.items() if isinstance(content, bytes)}
    assert changed == {"README.md", "compression_report.json"}
    assert published(files, "me/half") == contents


def test_a_card_keeps_licence_relation_and_tags_that_were_chosen(folder):
    files, _ = checkpoint_files(folder)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("tags:\n", "tags:\n- mine\n"))
    text = published(files, "me/half")["README.md"]
    assert isinstance(text, Path)  # the order of the tags is not ours: changed by hand
    (folder / "README.md").write_text(card.replace("- expert-merging\n", "- expert-merging\n- mine\n"))
    text = published(files, "me/half")["README.md"].decode()
    assert "- mine\n" in text and 'from_pretrained("me/half"' in text
