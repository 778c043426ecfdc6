"""The file in a mapped checkpoint that tells `trust_remote_code=True` which package to install."""

SHIM_NAME = "modeling_hf_mcsmoe"
SHIM = '''"""This model needs the package hf_mcsmoe: pip install hf-mcsmoe"""
from hf_mcsmoe import (  # noqa: F401
    MergedSparseMoeConfig,
    MergedSparseMoeForCausalLM,
    MergedSparseMoeForImageTextToText,
    MergedSparseMoeForMultimodalLM,
    MergedSparseMoeForSeq2SeqLM,
    MergedSparseMoeForSequenceClassification,
    MergedSparseMoeForTokenClassification,
    MergedSparseMoeModel,
)
'''
