"""Tiny random models of every MoE family of transformers, from the configurations in data/tiny_configs.json."""

import functools
import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mcsmoe.families import forward_call

TINY = json.loads((Path(__file__).parent / "data" / "tiny_configs.json").read_text(encoding="utf-8"))
# Their experts are not called with hidden states, slots and weights; they have tests of their own.
OTHER_CALLS = (
    "dbrx",
    "doge",
    "jetmoe",
    "llama4",
    "llama4_text",
    "nllb-moe",
    "switch_transformers",
    "vitpose_backbone",
)
STANDARD = tuple(key for key in TINY if key not in OTHER_CALLS)
# One or two of each way to write an MoE layer, for every run; the others repeat these with other names and sizes.
VARIED = (
    "mixtral",
    "gpt_oss",  # transposed, interleaved, with biases
    "deepseek_v3",  # shared experts, routers limited to groups
    "deepseek_v4",  # a table leads tokens to experts
    "qwen2_moe",  # a gated shared expert
    "granitemoe",
    "jamba",
    "nemotron_h",  # no gate
    "gemma4_text",  # scales of experts
    "longcat_flash",  # identity slots
    "inkling_text",  # rows of the router for shared experts
    "zaya",
    "dots3_note",  # experts for images beside those for text
    "ernie4_5_vl_moe_text",  # two sets of experts in one layer
    "diffusion_gemma",  # encoder and decoder share experts
)
VOCABULARY = 140  # ids from here on mean images and sounds in some of the models


def every_run_or_slow(keys: Iterable[str]) -> list[Any]:
    """Parameters of a test: the keys in `VARIED` run every time, the others only in slow runs."""
    return [key if key in VARIED else pytest.param(key, marks=pytest.mark.slow) for key in keys]


def named_class(reference: str) -> type:
    """The class at "module:name"."""
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def tiny_config(key: str) -> Any:
    """The configuration of a tiny model: 8 experts in each MoE layer, top-2 mostly, hidden size 32."""
    return named_class(TINY[key]["config"])(**TINY[key]["kwargs"])


@functools.cache
def tiny(key: str) -> PreTrainedModel:
    """The tiny model, with weights that make experts, biases and scales differ. Shared: do not change it."""
    torch.manual_seed(0)
    model = named_class(TINY[key]["model"])(tiny_config(key)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith(("bias", "statics")):
                parameter.normal_(0.0, 0.1, generator=generator)
            elif name.endswith("per_expert_scale"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif not parameter.any():  # gates that would close off a layer
                parameter.normal_(0.0, 0.1, generator=generator)
        for module in model.modules():
            fill_buffers(module, generator)
    return model


def fill_buffers(module: nn.Module, generator: torch.Generator) -> None:
    """Give correction biases values, and token-id tables distinct experts for each token."""
    for name, buffer in module.named_buffers(recurse=False):
        if name in ("e_score_correction_bias", "expert_bias", "balancing_biases"):
            buffer.add_(torch.empty_like(buffer).normal_(0.0, 0.1, generator=generator))
        elif name == "tid2eid":
            scores = torch.rand(buffer.shape[0], module.num_experts, generator=generator)
            buffer.copy_(scores.argsort(dim=1)[:, : buffer.shape[1]])


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """First output of a forward over token ids (B, S)."""
    torch.manual_seed(0)  # diffusion models start from random tokens
    called, inputs = forward_call(model, {"input_ids": ids})
    return called(**inputs)[0]
