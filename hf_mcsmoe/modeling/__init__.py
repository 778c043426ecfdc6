"""Merged experts, the model classes that hold them, and their registration with the Auto classes."""

from .merged_model import (
    MergedSparseMoeForCausalLM,
    MergedSparseMoeForImageTextToText,
    MergedSparseMoeForMultimodalLM,
    MergedSparseMoeForSeq2SeqLM,
    MergedSparseMoeForSequenceClassification,
    MergedSparseMoeForTokenClassification,
    MergedSparseMoeModel,
    merged_class,
)

__all__ = [
    "MergedSparseMoeForCausalLM",
    "MergedSparseMoeForImageTextToText",
    "MergedSparseMoeForMultimodalLM",
    "MergedSparseMoeForSeq2SeqLM",
    "MergedSparseMoeForSequenceClassification",
    "MergedSparseMoeForTokenClassification",
    "MergedSparseMoeModel",
    "merged_class",
]
