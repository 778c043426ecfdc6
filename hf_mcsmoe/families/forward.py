"""How a model that is not called with token ids alone is run on calibration data."""

import inspect
from typing import Any

from torch import Tensor, nn


def reading_part(model: nn.Module) -> nn.Module:
    """The part of a model that reads token ids: its text half where the whole only generates, else itself."""
    if type(model).forward is not nn.Module.forward:
        return model
    parts = [child for child in model.children() if hasattr(child, "get_input_embeddings")]
    return next(child for child in parts if type(child).forward is not nn.Module.forward)


def forward_call(model: nn.Module, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The module to call and its arguments.

    Args:
        model: The model that is calibrated.
        inputs: `input_ids`, `attention_mask` and what else the calibration data gives.

    Returns:
        Mostly `model` and `inputs`. Of a model that only generates (Qwen3-Omni), its `reading_part`. For one
        that reads embeddings, not ids (the talker of Qwen3-Omni), with the embeddings of the ids added.
    """
    model = reading_part(model)
    parameters = inspect.signature(type(model).forward).parameters
    if "talker_input_ids" in parameters and "inputs_embeds" not in inputs:
        embeddings: Tensor = model.get_input_embeddings()(inputs["input_ids"])
        inputs = {**inputs, "inputs_embeds": embeddings, "talker_input_ids": inputs["input_ids"]}
    return model, inputs
