"""Make sparse Mixture-of-Experts models small enough to run.

Importing this package registers `MergedSparseMoeConfig` and the model classes with transformers' Auto classes.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .calibrate import calibrate_moe
from .calibration import Calibration, load_calibration
from .compress import compress_moe
from .config import MergedSparseMoeConfig
from .decompose import decompose_merged
from .export import export_checkpoint
from .fitting import fit_recipe
from .modeling import (
    MergedSparseMoeForCausalLM,
    MergedSparseMoeForImageTextToText,
    MergedSparseMoeForMultimodalLM,
    MergedSparseMoeForSeq2SeqLM,
    MergedSparseMoeForSequenceClassification,
    MergedSparseMoeForTokenClassification,
    MergedSparseMoeModel,
)
from .modeling.densify import densify, harden
from .planning import plan
from .publishing import push_checkpoint, push_to_hub
from .recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from .training import (
        DistillationArguments,
        DistillationTrainer,
        SparsityScheduleCallback,
        cache_teacher,
        lora_config,
        prune_by_gradients,
    )

# Trainer and PEFT take a second to import, which whoever only loads a model need not wait for.
TRAINING = (
    "DistillationArguments",
    "DistillationTrainer",
    "SparsityScheduleCallback",
    "cache_teacher",
    "lora_config",
    "prune_by_gradients",
)

__all__ = [
    "PRESETS",
    "Calibration",
    "DistillationArguments",
    "DistillationTrainer",
    "MergedSparseMoeConfig",
    "MergedSparseMoeForCausalLM",
    "MergedSparseMoeForImageTextToText",
    "MergedSparseMoeForMultimodalLM",
    "MergedSparseMoeForSeq2SeqLM",
    "MergedSparseMoeForSequenceClassification",
    "MergedSparseMoeForTokenClassification",
    "MergedSparseMoeModel",
    "Recipe",
    "SparsityScheduleCallback",
    "cache_teacher",
    "calibrate_moe",
    "compress_moe",
    "decompose_merged",
    "densify",
    "export_checkpoint",
    "fit_recipe",
    "harden",
    "load_calibration",
    "lora_config",
    "plan",
    "prune_by_gradients",
    "push_checkpoint",
    "push_to_hub",
]


def __getattr__(name: str) -> Any:
    if name in TRAINING:
        return getattr(importlib.import_module(f"{__name__}.training"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *TRAINING})
