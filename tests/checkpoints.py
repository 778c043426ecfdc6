"""Comparing checkpoints on disk."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_mcsmoe.publishing import STATISTICS_FILE

VARYING = re.compile(r'seconds|"process": \d')  # lines of a report that say how long it took and how much memory


def tensors(folder):
    """All tensors of a checkpoint, by name."""
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def texts(folder):
    """Configuration, report and the other files of a checkpoint, without times, memory and its own name."""
    found = {"statistics": (Path(folder) / STATISTICS_FILE).read_bytes()}
    for file in Path(folder).iterdir():
        # All that the page says is in the report.
        if file.is_dir() or file.suffix in (".safetensors", ".html") or file.name.endswith(".index.json"):
            continue
        lines = file.read_text().replace(Path(folder).name, "NAME").splitlines()
        found[file.name] = [re.sub(r" in [\d.]+ (s|min|h)\b", "", line) for line in lines if not VARYING.search(line)]
    return found


def same_tensors(one, other):
    """Whether two checkpoints hold the same names, dtypes and bits."""
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def content(folder):
    """Names and bytes of all weight files."""
    return {file.name: file.read_bytes() for file in Path(folder).glob("*.safetensors")}


class Killed(BaseException):
    """Stands for SIGKILL: nothing between the place where it is raised and the test catches it."""
