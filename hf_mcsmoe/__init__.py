"""Make sparse Mixture-of-Experts models small enough to run.

Importing this package registers `MergedSparseMoeConfig` and the model classes with transformers' Auto classes.
"""

from .calibration import Calibration, load_calibration
from .compress import compress_moe
from .config import MergedSparseMoeConfig
from .layouts import plan
from .modeling import (
    MergedSparseMoeForCausalLM,
    MergedSparseMoeForImageTextToText,
    MergedSparseMoeForMultimodalLM,
    MergedSparseMoeForSeq2SeqLM,
    MergedSparseMoeForSequenceClassification,
    MergedSparseMoeForTokenClassification,
    MergedSparseMoeModel,
)
from .publishing import push_checkpoint, push_to_hub
from .recipe import PRESETS, Recipe

__all__ = [
    "PRESETS",
    "Calibration",
    "MergedSparseMoeConfig",
    "MergedSparseMoeForCausalLM",
    "MergedSparseMoeForImageTextToText",
    "MergedSparseMoeForMultimodalLM",
    "MergedSparseMoeForSeq2SeqLM",
    "MergedSparseMoeForSequenceClassification",
    "MergedSparseMoeForTokenClassification",
    "MergedSparseMoeModel",
    "Recipe",
    "compress_moe",
    "load_calibration",
    "plan",
    "push_checkpoint",
    "push_to_hub",
]
