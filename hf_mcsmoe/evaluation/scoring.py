"""How well a model predicts text, per domain and beside a baseline.

B rows, S tokens of the longest, V vocabulary, n predicted tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import Calibration, CalibrationBatch
from ..local_paths import public_model
from ..modeling.offload import execution_device
from .baseline_logits import BaselineLogits
from .samples import evaluation_mode
from .scores import Evaluation, scores_of

if TYPE_CHECKING:
    from .cached_baseline import BaselineCache

CHUNK_ELEMENTS = 2**24  # float32 logits handled at a time: 64 MB, and a few temporary tensors of that size


def evaluate_model(
    model: PreTrainedModel,
    data_by_domain: Mapping[str, Calibration],
    *,
    baseline: "PreTrainedModel | BaselineLogits | BaselineCache | None" = None,
    batch_size: int | None = None,
    chunk_tokens: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Next-token loss on every domain and, with a baseline, the distance to it on the same batches.

    A token is predicted if it and the one before it are real: padding is no target, and nothing is predicted from
    padding. All batches count, held-out ones too. Logits become float32 in chunks of tokens, sums are float64. Both
    models are in evaluation mode meanwhile and get their mode back.

    Args:
        model: A causal language model on any device or device map.
        data_by_domain: Batches by name of the domain, see `load_evaluation_data`.
        baseline: The model to compare with, usually the uncompressed one; same vocabulary, any device. As
            `BaselineLogits` it runs once for many calls. Or what it predicts,
            computed before by `evaluation.cached_baseline.write_baseline_cache`: then the KL is over its k
            likeliest tokens and all others as one outcome. That is at most the KL over the vocabulary, because
            taking outcomes together never raises a divergence; all other scores are the same.
        batch_size: Most rows in one forward pass; None takes the batches as they are.
        chunk_tokens: Tokens whose logits are float32 at a time; None bounds them to 64 MB. It changes no result.
        progress: Show a bar over the batches.

    Returns:
        The scores; `overall` weighs domains by their tokens. Standard errors and intervals take rows of text as
        independent, not tokens, see `evaluation.intervals.ratio_of_sums`; those of differences are paired; those of
        `overall` take the domains as strata.

    Raises:
        TypeError: A model that is no causal language model.
        ValueError: No domain, a domain without a token to predict, different vocabularies, a loss that is not
            finite, or a batch that cannot be split.
    """
    original = baseline.model if isinstance(baseline, BaselineLogits) else baseline
    models = [model, original] if isinstance(original, nn.Module) else [model]
    _check_input(models, data_by_domain, batch_size=batch_size, chunk_tokens=chunk_tokens)
    total = sum(len(data.batches) for data in data_by_domain.values())
    rows_by_domain = {}
    with (
        torch.inference_mode(),
        evaluation_mode(*models),
        logging.tqdm(total=total, desc="Evaluating", unit=" batches", delay=2, disable=not progress) as bar,
    ):
        for name, data in data_by_domain.items():
            rows = []
            for batch in data.batches:
                rows += [_score_batch(model, baseline, part, chunk_tokens) for part in _split(batch, batch_size)]
                bar.update()
            rows_by_domain[name] = torch.cat(rows, dim=1)
    sources = {name: data.source for name, data in data_by_domain.items()}
    return Evaluation(*scores_of(rows_by_domain), sources, _name(original), getattr(baseline, "top_k", None))


def _name(baseline: Any) -> str | None:
    """What a baseline calls itself, without folders of this machine."""
    if isinstance(baseline, nn.Module):
        return public_model(getattr(baseline.config, "name_or_path", None) or type(baseline).__name__)
    return public_model(getattr(baseline, "name", None))


def _check_input(
    models: list[PreTrainedModel], data_by_domain: Mapping[str, Calibration], **sizes: int | None
) -> None:
    for model in models:
        check_causal(model)
    if not data_by_domain:
        raise ValueError("data_by_domain is empty. Use load_evaluation_data(None, tokenizer) for the shipped text.")
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}, it must be at least 1. Leave it out for the default.")


def check_causal(model: PreTrainedModel) -> None:
    """Raise TypeError for a model that predicts no next token."""
    kind = None
    if model.config.is_encoder_decoder:
        kind = "an encoder-decoder model"
    elif model.get_output_embeddings() is None:
        kind = "a model without a language-model head"
    if kind is not None:
        raise TypeError(
            f"Only causal language models can be evaluated for now, got {type(model).__name__}, {kind}. "
            "Load it with AutoModelForCausalLM, or evaluate it with its own metric."
        )


def _split(batch: CalibrationBatch, batch_size: int | None) -> Iterator[CalibrationBatch]:
    num_rows = batch.token_mask.shape[0]
    if batch_size is None or num_rows <= batch_size:
        yield batch
        return
    odd = [name for name, tensor in batch.inputs.items() if tensor.shape[:1] != (num_rows,)]
    if odd:
        raise ValueError(
            f"A batch of {num_rows} rows cannot be split to batch_size {batch_size}: {odd} have another number of "
            "rows. Use batch_size=None to take batches as they are."
        )
    for start in range(0, num_rows, batch_size):
        part = slice(start, start + batch_size)
        inputs = {name: tensor[part] for name, tensor in batch.inputs.items()}
        yield replace(batch, inputs=inputs, token_mask=batch.token_mask[part])


def _score_batch(
    model: PreTrainedModel,
    baseline: "PreTrainedModel | BaselineLogits | BaselineCache | None",
    batch: CalibrationBatch,
    chunk_tokens: int | None,
) -> Tensor:
    """Sums over the predicted tokens of each row, (1 + c, B) float64: their number, then the c of `_score_tokens`."""
    mask, ids = batch.token_mask.cpu(), batch.inputs["input_ids"].cpu()
    row, position = (mask[:, :-1] & mask[:, 1:]).nonzero(as_tuple=True)  # (n,) each: what predicts its successor
    target = ids[row, position + 1]
    num_rows, length = mask.shape
    logits = _logits(model, batch)  # (B S, V)
    reference, vocab_size = _reference(baseline, batch, row, position)
    if vocab_size not in (None, logits.shape[-1]):
        raise ValueError(
            f"The model has {logits.shape[-1]} tokens in its vocabulary, the baseline {vocab_size}. "
            "Compare with the model that was compressed."
        )
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // logits.shape[-1])
    # Selecting by index, not by mask, needs no host sync; scores stay on the device until the batch is done.
    scores = []
    for part in torch.arange(len(row)).split(chunk):
        place = (row * length + position)[part]
        chosen, part_target = logits[place.to(logits.device)], target[part].to(logits.device)
        if isinstance(reference, Tensor):
            baseline_logits = reference[place.to(reference.device)].to(logits.device)
            scores.append(_score_tokens(part_target, chosen, baseline_logits))
        elif reference is not None:
            scores.append(reference.scores(part, part_target, chosen))
        else:
            scores.append(_score_tokens(part_target, chosen))
    weights = torch.cat(scores, dim=1).cpu().double()  # (c, n)
    sums = [torch.bincount(row, values, minlength=num_rows) for values in weights]
    return torch.stack([torch.bincount(row, minlength=num_rows).double(), *sums])


def _reference(
    baseline: "PreTrainedModel | BaselineCache | None", batch: CalibrationBatch, row: Tensor, position: Tensor
) -> tuple[Any, int | None]:
    """What the baseline predicts: its logits (B S, V), or `CachedTokens` of the chosen ones; and its V."""
    if baseline is None:
        return None, None
    if isinstance(baseline, BaselineLogits):
        logits = baseline.kept(batch)
        if logits is None:
            logits = _logits(baseline.model, batch)
            baseline.keep(batch, logits)
        return logits, logits.shape[-1]
    if isinstance(baseline, nn.Module):
        logits = _logits(baseline, batch)
        return logits, logits.shape[-1]
    return baseline.tokens(batch, row, position), baseline.vocab_size


def _logits(model: PreTrainedModel, batch: CalibrationBatch) -> Tensor:
    """(B S, V) in the model's dtype."""
    device = execution_device(model.get_input_embeddings())
    # With labels the model would make float32 logits of the whole batch for a loss that nobody reads.
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    if logits.shape[:2] != batch.token_mask.shape:
        raise ValueError(
            f"{type(model).__name__} gave logits for {tuple(logits.shape[:2])} tokens, the batch has "
            f"{tuple(batch.token_mask.shape)}. Merge or remove adapters that add virtual tokens."
        )
    return logits.flatten(0, 1)


def _score_tokens(target: Tensor, logits: Tensor, baseline_logits: Tensor | None = None) -> Tensor:
    """Loss of each token and, with a baseline, its loss, KL(baseline || model) and whether the top tokens agree.

    Args:
        target: The tokens to predict, (n,) int64.
        logits: (n, V).
        baseline_logits: (n, V) on the same device.

    Returns:
        (1, n) or (4, n) float32.
    """
    log_q = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -log_q.gather(-1, target[:, None]).squeeze(-1)
    if baseline_logits is None:
        return loss[None]
    log_p = torch.log_softmax(baseline_logits, dim=-1, dtype=torch.float32)
    baseline_loss = -log_p.gather(-1, target[:, None]).squeeze(-1)
    p = log_p.exp()
    # Tokens that the baseline rules out (-inf) add nothing; the difference of two -inf would be NaN.
    kl = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
    agrees = logits.argmax(-1) == baseline_logits.argmax(-1)
    return torch.stack([loss, baseline_loss, kl, agrees.float()])
