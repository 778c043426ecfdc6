"""Quantized checkpoints: packed weights cannot be merged, but some formats are unpacked while they are loaded."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig


def dequantizing_config(config: PreTrainedConfig) -> Any | None:
    """What to give `from_pretrained` as `quantization_config` so that it loads plain weights; None if they are.

    Formats that transformers can unpack (FP8, MXFP4, ...) have an option `dequantize`.

    Args:
        config: Configuration of the checkpoint.

    Raises:
        ValueError: The checkpoint is quantized in a format that cannot be unpacked while loading.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    quantization = AutoQuantizationConfig.from_dict(dict(stored)) if isinstance(stored, dict) else stored
    if not hasattr(quantization, "dequantize"):
        raise ValueError(
            f"The checkpoint is quantized ({method_name(quantization)}), and transformers cannot unpack that "
            "format while loading. Start from the bfloat16 checkpoint and quantize the result."
        )
    quantization.dequantize = True
    return quantization


def unpacking_of_layers(quantization: Any) -> Any | None:
    """Unpacking by transformers of a few tensors at a time; None for a format that needs the whole model.

    Args:
        quantization: From `dequantizing_config`.
    """
    if method_name(quantization) != "fp8":
        return None
    return AutoHfQuantizer.from_config(quantization, pre_quantized=True)


def unpacking_notice(quantization: Any, dtype: Any) -> str:
    """What users are told of a result."""
    return f"The checkpoint was quantized ({method_name(quantization)}); the result is in {dtype}."


def refuse_quantized(model: PreTrainedModel) -> None:
    """Raise ValueError for a loaded model whose weights are packed."""
    method = getattr(model, "quantization_method", None) or getattr(model.config, "quantization_config", None)
    if method is not None:
        name = getattr(method, "value", method)
        raise ValueError(
            f"The model is quantized ({name}); its packed weights cannot be merged. Give compress_moe the path, which "
            "unpacks FP8 and MXFP4 while loading, or load it with quantization_config=...(dequantize=True)."
        )


def method_name(quantization: Any) -> str:
    """The name of the format of a quantization configuration, e.g. "fp8"."""
    method = quantization.quant_method
    return getattr(method, "value", method)


def forget_unpacking(model: PreTrainedModel) -> None:
    """Let a model that was unpacked while loading be saved as the plain model that it is now.

    `save_pretrained` reverts the conversions of the checkpoint that the model came from, and an unpacking has no
    reverse; without the record it takes those of the architecture.
    """
    model.__dict__.pop("_weight_conversions", None)
