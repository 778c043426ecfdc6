"""What of a folder is a checkpoint: its files, and whether they are complete."""

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..config import MergedSparseMoeConfig
from ..modeling.shim import SHIM_NAME
from .card import CARD_FILE
from .report import read_report

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pyc")  # training state; unsafe to load
UNFINISHED = (".tmp", ".lock", ".part", ".incomplete")
PRIVATE_FOLDERS = ("checkpoint-*", "runs", "__pycache__")  # of Trainer, TensorBoard and Python
PUBLISHED_HIDDEN = ".eval_results"  # where the Hub reads benchmark results


def checkpoint_files(folder: str | Path) -> tuple[dict[str, Path], list[str]]:
    """The files of a compressed checkpoint, after a look at whether a model can be loaded from them.

    Hidden files, pickles (Trainer's `training_args.bin` would even hold a `hub_token`), checkpoints of a training,
    TensorBoard logs and unfinished files are no part of it.

    Args:
        folder: Holds configuration, safetensors weights and `compression_report.json`.

    Returns:
        The files by their names in the repository, in the order of the names, and the names of those left out.

    Raises:
        FileNotFoundError: No folder, or a file that a checkpoint has is missing.
        ValueError: A file that cannot be read, weights that were cut off or miss tensors, or a card whose metadata
            the Hub would refuse.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Give the folder of a compressed model.")
    config = _read_json(folder / CONFIG_NAME)
    read_report(folder)
    check_weights(folder)
    if config.get("model_type") == MergedSparseMoeConfig.model_type and not (folder / f"{SHIM_NAME}.py").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {SHIM_NAME}.py, with which a mapped checkpoint loads by trust_remote_code=True. "
            "Load the model and save it again with save_pretrained."
        )
    if (folder / CARD_FILE).is_file():
        check_card((folder / CARD_FILE).read_text(encoding="utf-8"))
    everything = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name.as_posix(): path for name, path in everything.items() if _belongs(name)}
    return files, [name.as_posix() for name in everything if name.as_posix() not in files]


def check_weights(folder: Path) -> None:
    """Raise if the weights in a folder are not there, not whole, or not all that their index lists.

    Raises:
        FileNotFoundError: No weights, or a shard is missing.
        ValueError: A file that is cut off or damaged, or tensors that are not where the index says.
    """
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        if not (folder / SAFE_WEIGHTS_NAME).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no weights: neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. "
                "Save the model there with save_pretrained."
            )
        _tensor_names(folder / SAFE_WEIGHTS_NAME)
        return
    expected: dict[str, set[str]] = {}
    for name, file in _read_json(folder / SAFE_WEIGHTS_INDEX_NAME)["weight_map"].items():
        expected.setdefault(file, set()).add(name)
    for file, names in sorted(expected.items()):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {file}, one of {len(expected)} files of weights. Save the model again."
            )
        missing = sorted(names - _tensor_names(folder / file))
        if missing:
            raise ValueError(f"{file} in {str(folder)!r} has no tensor {missing[0]!r}. Save the model again.")


def check_card(text: str) -> None:
    """Raise ValueError for a model card whose metadata is not there or would be refused by the Hub.

    These are the rules that need no server; the server looks again before it takes a file.
    """
    try:
        metadata = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"The metadata of {CARD_FILE} cannot be read: {error}. Repair or delete the file.") from error
    problem = _problem(metadata)
    if problem:
        raise ValueError(f"The metadata of {CARD_FILE} is not valid: {problem}. Repair or delete the file.")


def _problem(metadata: dict[str, Any]) -> str | None:
    """The first thing about a card's metadata that the Hub would refuse."""
    if not metadata:
        return "there is none"
    tags = metadata.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        return f"tags is {tags!r}, it must be a list of strings"
    parents = metadata.get("base_model", [])
    for parent in parents if isinstance(parents, list) else [parents]:
        try:
            validate_repo_id(parent)
        except HFValidationError:
            return f"base_model {parent!r} is no id of a model on the Hub"
    if metadata.get("license") == "other" and not metadata.get("license_name"):
        return "license 'other' needs a license_name"
    return None


def _belongs(name: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts) and name.parts[0] != PUBLISHED_HIDDEN
    private = any(folder.match(pattern) for folder in name.parents if folder.name for pattern in PRIVATE_FOLDERS)
    return not hidden and not private and name.suffix not in (*PICKLES, *UNFINISHED)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {str(path)!r}. Give the folder of a compressed model.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}. Save the model again.") from error


def _tensor_names(path: Path) -> set[str]:
    """The tensors of a file, whose length is that of its header's tensors."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged or cut off: {error}. Save the model again.") from error
