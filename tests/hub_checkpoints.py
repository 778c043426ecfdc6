"""Checkpoints to push, and the code that pushes them."""

import shutil

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.evaluation import evaluate_model, load_evaluation_data
from hf_mcsmoe.loading import load_model
from hf_mcsmoe.publishing import read_report, write_card, write_report

PUSH = "from hf_mcsmoe import push_checkpoint\nresult = push_checkpoint({folder!r}, {repo!r}{options}).commit_url"
UNWANTED = ("training_args.bin", ".cache/state", "checkpoint-3/model.safetensors", "runs/x/events", "a.tmp")


def push(folder, repo, **options):
    """Code that pushes a folder."""
    return PUSH.format(folder=str(folder), repo=repo, options="".join(f", {k}={v!r}" for k, v in options.items()))


def content(folder):
    """The files in a folder, by their paths."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commits(hub, repo):
    """How many were made, without the one that every repository starts with."""
    return len(hub.repositories[repo].commits) - 1


def save_original(checkpoint, folder):
    """A copy of a checkpoint, with a tokenizer of one word per token."""
    shutil.copytree(checkpoint, folder)
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(160)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokens = {"unk_token": "w0", "pad_token": "w0", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    return folder


def save_results(source, tokens, folder):
    """Compress a model into folder/mapped (in shards, evaluated, with unwanted files) and folder/native (one file)."""
    how = {"calibration": tokens, "progress": False}
    compress_moe(source, Recipe(keep=0.5), output_dir=folder / "mapped", executor="streaming", **how)
    native = Recipe(keep=0.5, layout="native")
    compress_moe(source, native, output_dir=folder / "native", executor="in_memory", **how)
    np.save(folder / "tokens.npy", tokens.numpy())
    rows = load_evaluation_data(str(folder / "tokens.npy"), None, vocab_size=160, num_samples=8)
    scores = evaluate_model(load_model(folder / "mapped"), rows, baseline=load_model(source))
    write_report(read_report(folder / "mapped"), folder / "mapped", scores)
    write_card(folder / "mapped", repo_name="mapped")
    for unwanted in UNWANTED:
        path = folder / "mapped" / unwanted
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("unwanted")
    return folder
