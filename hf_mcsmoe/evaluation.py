"""How well a model predicts text, per domain and beside a baseline.

B rows, S tokens of the longest, V vocabulary, n predicted tokens.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .calibration import Calibration, CalibrationBatch
from .evaluation_data import load_evaluation_data
from .modeling.offload import execution_device
from .samples import evaluation_mode, generate_samples, repetition

__all__ = ["DomainScore", "Evaluation", "evaluate_model", "generate_samples", "load_evaluation_data", "repetition"]

CHUNK_ELEMENTS = 2**24  # float32 logits handled at a time: 64 MB, and a few temporary tensors of that size


@dataclass(frozen=True)
class DomainScore:
    """How well a model predicts the text of one domain; the baseline's fields are None without a baseline."""

    tokens: int  # predicted tokens: the next one is real, and so is the one before it
    loss: float  # nats per predicted token
    loss_standard_error: float | None  # nats; tokens of a row count as dependent. None: fewer than two rows
    perplexity: float  # exp(loss), at most exp(700)
    baseline_loss: float | None = None  # nats per predicted token
    kl: float | None = None  # mean of KL(baseline || model), nats per token
    top1_agreement: float | None = None  # share of tokens for which both models have the same most likely one


@dataclass(frozen=True)
class Evaluation:
    """Scores by domain, and of all their tokens together."""

    domains: dict[str, DomainScore]
    overall: DomainScore
    sources: dict[str, str] = field(default_factory=dict)  # what text each domain is, in words

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return asdict(self)


def evaluate_model(
    model: PreTrainedModel,
    data_by_domain: Mapping[str, Calibration],
    *,
    baseline: PreTrainedModel | None = None,
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
        baseline: The model to compare with, usually the uncompressed one; same vocabulary, any device.
        batch_size: Most rows in one forward pass; None takes the batches as they are.
        chunk_tokens: Tokens whose logits are float32 at a time; None bounds them to 64 MB. It changes no result.
        progress: Show a bar over the batches.

    Returns:
        The scores; `overall` weighs domains by their tokens. The standard error of the loss is that of a ratio of
        sums over rows, `sqrt(R / (R - 1) * sum_r (L_r - loss * n_r)²) / sum_r n_r` for R rows of n_r tokens and
        summed loss L_r; that of `overall` takes the domains as strata.

    Raises:
        TypeError: A model that is no causal language model.
        ValueError: No domain, a domain without a token to predict, different vocabularies, a loss that is not
            finite, or a batch that cannot be split.
    """
    models = [model] if baseline is None else [model, baseline]
    _check_input(models, data_by_domain, batch_size=batch_size, chunk_tokens=chunk_tokens)
    total = sum(len(data.batches) for data in data_by_domain.values())
    domains = {}
    with (
        torch.inference_mode(),
        evaluation_mode(*models),
        logging.tqdm(total=total, desc="Evaluating", unit=" batches", delay=2, disable=not progress) as bar,
    ):
        for name, data in data_by_domain.items():
            rows = []
            for batch in data.batches:
                rows += [_score_batch(models, part, chunk_tokens) for part in _split(batch, batch_size)]
                bar.update()
            domains[name] = _domain_score(name, torch.cat(rows, dim=1))
    sources = {name: data.source for name, data in data_by_domain.items()}
    return Evaluation(domains, _overall_score(list(domains.values())), sources)


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


def _score_batch(models: list[PreTrainedModel], batch: CalibrationBatch, chunk_tokens: int | None) -> Tensor:
    """Sums over the predicted tokens of each row, (1 + c, B) float64: their number, then the c of `_score_tokens`."""
    mask, ids = batch.token_mask.cpu(), batch.inputs["input_ids"].cpu()
    row, position = (mask[:, :-1] & mask[:, 1:]).nonzero(as_tuple=True)  # (n,) each: what predicts its successor
    target = ids[row, position + 1]
    num_rows, length = mask.shape
    logits = [_logits(model, batch) for model in models]  # (B S, V)
    if len({part.shape[-1] for part in logits}) > 1:
        raise ValueError(
            f"The model has {logits[0].shape[-1]} tokens in its vocabulary, the baseline {logits[1].shape[-1]}. "
            "Compare with the model that was compressed."
        )
    device = logits[0].device
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // logits[0].shape[-1])
    # Selecting by index, not by mask, needs no host sync; scores stay on the device until the batch is done.
    scores = []
    for part, part_target in zip((row * length + position).split(chunk), target.split(chunk), strict=True):
        chosen = [values[part.to(values.device)].to(device) for values in logits]
        scores.append(_score_tokens(part_target.to(device), *chosen))
    weights = torch.cat(scores, dim=1).cpu().double()  # (c, n)
    sums = [torch.bincount(row, values, minlength=num_rows) for values in weights]
    return torch.stack([torch.bincount(row, minlength=num_rows).double(), *sums])


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


def _domain_score(name: str, rows: Tensor) -> DomainScore:
    """The scores from the sums of each row, (1 + c, R) float64."""
    tokens, loss_sums = rows[0], rows[1]
    total = tokens.sum()
    if total == 0:
        raise ValueError(f"Domain {name!r} has no token to predict: its rows have fewer than two real tokens.")
    means = (rows[1:].sum(dim=1) / total).tolist()
    if not all(map(math.isfinite, means)):
        raise ValueError(
            f"The scores of domain {name!r} are not finite (loss, baseline loss, KL, agreement: {means}). "
            "Look for NaN or Inf in the weights, or load the models in bfloat16 or float32 instead of float16."
        )
    used = tokens > 0
    num_rows, standard_error = int(used.sum()), None
    if num_rows > 1:
        residual = loss_sums[used] - means[0] * tokens[used]
        standard_error = float((residual.square().sum() * num_rows / (num_rows - 1)).sqrt() / total)
    return _score(int(total), means, standard_error)


def _overall_score(domains: list[DomainScore]) -> DomainScore:
    tokens = sum(domain.tokens for domain in domains)
    names = ["loss"] if domains[0].baseline_loss is None else ["loss", "baseline_loss", "kl", "top1_agreement"]
    means = [sum(getattr(domain, name) * domain.tokens for domain in domains) / tokens for name in names]
    errors = [domain.loss_standard_error for domain in domains]
    standard_error = None
    if None not in errors:
        standard_error = math.hypot(*(d.tokens / tokens * e for d, e in zip(domains, errors, strict=True)))
    return _score(tokens, means, standard_error)


def _score(tokens: int, means: list[float], standard_error: float | None) -> DomainScore:
    perplexity = math.exp(min(means[0], 700.0))  # a float holds no more
    if len(means) == 1:
        return DomainScore(tokens, means[0], standard_error, perplexity)
    loss, baseline_loss, kl, agreement = means
    # The divergence is never negative; rounding in float32 can make it so where the models are all but equal.
    return DomainScore(tokens, loss, standard_error, perplexity, baseline_loss, max(kl, 0.0), agreement)
