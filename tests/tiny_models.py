"""Tiny random MoE models of every way of writing one, built from a configuration in milliseconds."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

CAUSAL_FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "glm4_moe",
    "nemotron_h",
    "gemma4_text",
)
# These differ in how they are written; the others are in slow runs.
VARIED_FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "gemma4_text")
NUM_EXPERTS = 8
TOP_K = 2


def in_every_run(model_types: Iterable[str]) -> list[Any]:
    """Families as parameters of a test, in slow runs only those that are written like another one."""
    slow = set(CAUSAL_FAMILIES) - set(VARIED_FAMILIES)
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in model_types]


COMMON = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"n_routed_experts": NUM_EXPERTS, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

# What each family adds to COMMON; None takes an entry out. deepseek_v3 and glm4_moe start with a dense layer.
CHANGES = {
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "qwen2_moe": {
        "num_experts": NUM_EXPERTS,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "sliding_window": 16,
    },
    "qwen3_moe": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 24, "sliding_window": 16, "head_dim": 8},
    "olmoe": {"num_experts": NUM_EXPERTS},
    "deepseek_v3": {**GROUPED, **MLA, "num_key_value_heads": 4, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    "gpt_oss": {
        "num_local_experts": NUM_EXPERTS,
        "head_dim": 8,
        "sliding_window": 16,
        "max_position_embeddings": 131072,  # YaRN warns about anything shorter
    },
    "granitemoe": {"num_local_experts": NUM_EXPERTS},
    "glm4_moe": {**GROUPED, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    "nemotron_h": {
        **GROUPED,
        "num_hidden_layers": None,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "moe_shared_expert_intermediate_size": 20,
        "head_dim": 8,
        "chunk_size": 8,
        "mamba_head_dim": 8,
        "mamba_num_heads": 4,
        "n_groups": 2,
        "ssm_state_size": 8,
        "num_nextn_predict_layers": 0,
    },
    "gemma4_text": {
        "num_experts_per_tok": None,
        "num_experts": NUM_EXPERTS,
        "top_k_experts": TOP_K,
        "enable_moe_block": True,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 160,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
}
SWITCH = {
    "vocab_size": 160,
    "d_model": 32,
    "d_ff": 40,
    "d_kv": 8,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "num_experts": NUM_EXPERTS,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "decoder_start_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_config(model_type: str, **changes) -> PreTrainedConfig:
    """Configuration of a model of a few thousand numbers with 8 experts, top-2, and at least 2 MoE layers.

    Args:
        model_type: One of `CAUSAL_FAMILIES`, or "switch_transformers" (top-1).
        changes: Fields that differ.
    """
    if model_type == "switch_transformers":
        return AutoConfig.for_model(model_type, **{**SWITCH, **changes})
    values = {**COMMON, **CHANGES[model_type], **changes}
    return AutoConfig.for_model(model_type, **{name: value for name, value in values.items() if value is not None})


def tiny_model(model_type: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model of `tiny_config` in evaluation mode, float32.

    Weights are drawn with a deviation of 0.1, so that logits differ between tokens. Biases, correction biases
    and per-expert scales differ between experts too: a result that cuts the wrong rows cannot go unnoticed.
    """
    auto_class = AutoModelForSeq2SeqLM if model_type == "switch_transformers" else AutoModelForCausalLM
    model = auto_class.from_config(tiny_config(model_type, **changes), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith(".bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
            elif name.endswith("per_expert_scale"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(
                (".sinks", ".dt_bias")
            ):  # which transformers draws from a generator that other tests use too
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(seed))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1, generator=generator)
    return model
