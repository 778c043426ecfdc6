"""Encoder-decoder models: target tokens for calibration, and which layers see them. B rows of S source tokens."""

import dataclasses

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import CalibrationBatch


def decoder_modules(model: PreTrainedModel) -> set[nn.Module]:
    """The modules of the decoder of an encoder-decoder, whose tokens are the target tokens; empty for others."""
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return set(model.get_decoder().modules()) if is_encoder_decoder else set()


def with_decoder_inputs(batch: CalibrationBatch, model: PreTrainedModel) -> CalibrationBatch:
    """The batch with `decoder_input_ids`, where the model is an encoder-decoder and the batch has none.

    Each row is then its own target, as in teacher forcing: the start token followed by the row without its last
    token, padded on the right. Every decoder layer thus sees as many tokens as an encoder layer. For a model that
    was trained on other targets (translation, say), give batches with `decoder_input_ids`, and with
    `decoder_attention_mask` if they are padded.

    Raises:
        ValueError: The configuration names no token that a target starts with.
    """
    if not getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" in batch.inputs:
        return batch
    start, filler = (special_token(model, name) for name in ("decoder_start_token_id", "pad_token_id"))
    start = filler if start is None else start
    if start is None:
        raise ValueError(
            f"{type(model.config).__name__} has neither decoder_start_token_id nor pad_token_id, so no token starts "
            "the targets. Set decoder_start_token_id, or give calibration batches with decoder_input_ids."
        )
    ids, is_real = batch.inputs["input_ids"], batch.token_mask
    # Real tokens first, in their order, so that it does not matter on which side the source is padded.
    order = (~is_real).to(torch.int64).sort(dim=1, stable=True).indices
    targets, mask = ids.gather(1, order), is_real.gather(1, order)
    targets = targets.roll(1, dims=1).masked_fill(~mask, start if filler is None else filler)
    targets[:, 0] = start
    inputs = {**batch.inputs, "decoder_input_ids": targets}
    if not mask.all():
        inputs["decoder_attention_mask"] = mask.to(torch.int64)
    return dataclasses.replace(batch, inputs=inputs)


def special_token(model: PreTrainedModel, name: str) -> int | None:
    """A token id that the model's configuration or generation configuration says."""
    owners = (model.config, getattr(model, "generation_config", None))
    return next((x for x in (getattr(owner, name, None) for owner in owners) if x is not None), None)


def decoder_mask(batch: CalibrationBatch) -> Tensor:
    """True for real target tokens, (B, S') bool."""
    mask = batch.inputs.get("decoder_attention_mask")
    return torch.ones_like(batch.inputs["decoder_input_ids"]).bool() if mask is None else mask.bool()
