"""Which experts tasks ask for: a store of patterns, one a task, and the task that is nearest to a prompt.

PreMoe (2025, https://arxiv.org/abs/2505.17639): a pattern holds, for each MoE layer, the score "expected_selection" of
its N experts on the tokens of a task. `load_experts` in partial_loading.py loads what a pattern names and no more.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .calibration import load_calibration
from .executors.in_memory import collect_statistics
from .families import find_layers
from .saliency import SALIENCY

SCORE = "expected_selection"
FORMAT_VERSION = 1
INDEX_FILE, SCORES_FILE = "task_patterns.json", "task_patterns.safetensors"

Pattern = dict[str, Tensor]  # (N,) float64 by the name of the experts module


def task_pattern(
    model: PreTrainedModel, texts: Any, tokenizer: Any = None, *, progress: bool = False, **options: Any
) -> Pattern:
    """The pattern of a task, or of one prompt. One forward; no expert is run twice.

    Args:
        model: The original model.
        texts: Whatever `load_calibration` takes.
        tokenizer: Needed for text.
        progress: Show a progress bar.
        options: Of `load_calibration`.

    Raises:
        ValueError: The model has no MoE layer, or no token reaches one.
    """
    layers = find_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer that hf_mcsmoe knows. Choose another model.")
    data = load_calibration(texts, tokenizer, held_out_fraction=0, **options)
    found, _ = collect_statistics(model, layers, data, SALIENCY.needs(SCORE), progress=progress)
    return {name: SALIENCY[SCORE](statistics, None) for name, statistics in found.items()}


def save_task_patterns(patterns: Mapping[str, Pattern], folder: str | Path) -> None:
    """Write a store: names and sizes as JSON, scores as safetensors.

    Raises:
        ValueError: No patterns, or two of them are of different models.
    """
    check_alike(patterns)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {layer: score.numel() for layer, score in next(iter(patterns.values())).items()}
    index = {"format_version": FORMAT_VERSION, "score": SCORE, "tasks": list(patterns), "layers": sizes}
    tensors = {
        f"{place}.{layer}": score.contiguous()
        for place, pattern in enumerate(patterns.values())
        for layer, score in pattern.items()
    }
    save_file(tensors, folder / SCORES_FILE)
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_task_patterns(folder: str | Path) -> dict[str, Pattern]:
    """The store that `save_task_patterns` wrote, task by task in its order.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Of a newer format, or its files do not belong together.
    """
    folder = Path(folder)
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {INDEX_FILE}. Give a folder of save_task_patterns.")
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    if index["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{str(folder)!r} has format_version {index['format_version']}, this hf_mcsmoe reads up to "
            f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade hf-mcsmoe"
        )
    tensors = load_file(folder / SCORES_FILE)
    expected = {
        f"{place}.{layer}": size for place in range(len(index["tasks"])) for layer, size in index["layers"].items()
    }
    if {name: tensor.numel() for name, tensor in tensors.items()} != expected:
        raise ValueError(f"{SCORES_FILE} in {str(folder)!r} is not what {INDEX_FILE} describes. Save the store again.")
    return {
        task: {layer: tensors[f"{place}.{layer}"] for layer in index["layers"]}
        for place, task in enumerate(index["tasks"])
    }


def nearest_task(patterns: Mapping[str, Pattern], pattern: Pattern) -> tuple[str, float]:
    """(task, cosine) of the stored pattern with the largest cosine to `pattern`, over all layers together.

    Ties go to the earlier task. A pattern of zeros has a cosine of 0 with any other.

    Raises:
        ValueError: No patterns, or they are of different models.
    """
    check_alike({**patterns, "the given pattern": pattern})
    given = flat(pattern)
    cosines = {task: cosine(flat(one), given) for task, one in patterns.items()}
    best = max(cosines, key=cosines.get)
    return best, cosines[best]


def flat(pattern: Pattern) -> Tensor:
    """The scores of all layers in one vector, layers by name."""
    return torch.cat([pattern[layer].double() for layer in sorted(pattern)])


def cosine(left: Tensor, right: Tensor) -> float:
    """Cosine of two vectors; 0 where one is zero."""
    lengths = left.norm() * right.norm()
    return (left @ right / lengths).item() if lengths > 0 else 0.0


def check_alike(patterns: Mapping[str, Pattern]) -> None:
    """Raise ValueError for patterns of different models, or for none."""
    kinds = {task: {layer: score.numel() for layer, score in one.items()} for task, one in patterns.items()}
    if not [task for task in patterns if task != "the given pattern"]:
        raise ValueError("There are no task patterns. Make some with task_pattern.")
    first, *others = kinds
    odd = [task for task in others if kinds[task] != kinds[first]]
    if odd:
        raise ValueError(
            f"The patterns of {first!r} and {odd[0]!r} are of different models: their layers or numbers of experts "
            "differ. Make all of them with one model."
        )
