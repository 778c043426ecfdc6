"""Whether a model is streamed, why not, and where."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..auto_candidates import AUTO
from ..dequantize import dequantizing_config, method_name, unpacking_of_layers
from ..recipe import Recipe
from .shards import NotStreamableError

logger = logging.get_logger(__name__)

EXECUTORS = ("auto", "in_memory", "streaming")


def choose_executor(
    executor: str, recipe: Recipe, path: str | Path | None, output_dir: str | Path | None, device_map: Any
) -> bool:
    """Whether to stream, as far as the arguments of `compress_moe` decide it.

    Where the recipe is what stands against it, both "auto" and "streaming" warn and load the model.

    Raises:
        ValueError: An unknown executor, or "streaming" without a path, without an output or with a device map.
    """
    if executor not in EXECUTORS:
        raise ValueError(f"executor {executor!r} is unknown; choose one of {list(EXECUTORS)}.")
    possible = path is not None and output_dir is not None and device_map is None
    if executor == "streaming" and not possible:
        raise ValueError(
            "executor 'streaming' needs the path or Hub id of a model, an output_dir, and no device_map. "
            "Give those, or use executor='in_memory'."
        )
    if executor == "in_memory" or not possible:
        return False
    if recipe.preset == AUTO:
        logger.warning(
            f"{str(path)!r} is not streamed: the preset {AUTO!r} tries recipes on copies of the whole model, which is "
            "loaded into memory. Name a preset such as 'joint-obs' (mapped) or 'narrow-obs' (native) to stream it."
        )
        return False
    return True


def check_streamable(config: PreTrainedConfig, recipe: Recipe, trust_remote_code: bool) -> None:
    """Raise NotStreamableError for what configuration and recipe alone rule out."""
    packed = dequantizing_config(config)
    if packed is not None and unpacking_of_layers(packed) is None:
        raise NotStreamableError(f"its weights are quantized ({method_name(packed)})")
    if trust_remote_code and getattr(config, "auto_map", None):
        raise NotStreamableError("it brings its own code")
    reason = reason_against_recipe(recipe)
    if reason is not None:
        raise NotStreamableError(reason)


def reason_against_recipe(recipe: Recipe) -> str | None:
    """Why a recipe cannot be streamed, whatever the model; None if it can."""
    if recipe.statistics_with("gradients"):
        return "its recipe needs gradients of the loss, through all layers at once"
    if recipe.allots_neurons:
        return (
            f"its recipe's allocation {recipe.allocation!r} looks at the neurons of all layers before it narrows one"
        )
    return None


def say_loaded(path: str | Path, reason: object) -> None:
    """Warn that a model is loaded where it was to be streamed, and why."""
    logger.warning(
        f"{str(path)!r} cannot be streamed: {reason}. It is loaded with device_map='auto' instead: layers that do "
        "not fit in memory stay on the disk."
    )


def choose_device(device: str | torch.device) -> torch.device:
    """The device, "auto" being the GPU where there is one."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
