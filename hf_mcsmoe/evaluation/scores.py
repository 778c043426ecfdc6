"""What an evaluation found: scores by domain with their intervals, from the sums of each row of text."""

import dataclasses
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from .generation import GenerationCheck
from .intervals import CONFIDENCE, Interval, RatioEstimate, ratio_of_sums, stratified

# What the rows of the sums are, after the number of tokens; the second to fourth need a baseline.
MEASURES = ("loss", "baseline_loss", "kl", "top1_agreement")


@dataclass(frozen=True)
class DomainScore:
    """How well a model predicts the text of one domain; the baseline's fields are None without a baseline.

    Intervals are those of `evaluation.intervals.ratio_of_sums`; None: fewer than two rows.
    """

    tokens: int  # predicted tokens: the next one is real, and so is the one before it
    loss: float  # nats per predicted token
    loss_standard_error: float | None  # nats; tokens of a row count as dependent. None: fewer than two rows
    perplexity: float  # exp(loss), at most exp(700)
    baseline_loss: float | None = None  # nats per predicted token
    kl: float | None = None  # mean of KL(baseline || model), nats per token; see Evaluation.kl_top_k
    top1_agreement: float | None = None  # share of tokens for which both models have the same most likely one
    rows: int | None = None  # with a predicted token
    loss_interval: Interval | None = None
    perplexity_interval: Interval | None = None  # exp of that of the loss
    baseline_perplexity: float | None = None
    loss_increase: float | None = None  # loss - baseline_loss
    loss_increase_interval: Interval | None = None  # paired: of the differences of the rows
    kl_interval: Interval | None = None
    top1_agreement_interval: Interval | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores by domain, and of all their tokens together."""

    domains: dict[str, DomainScore]
    overall: DomainScore
    sources: dict[str, str] = field(default_factory=dict)  # what text each domain is, in words
    baseline: str | None = None  # name of the model that it was compared with
    # None: `kl` is over the whole vocabulary. k: over the baseline's k likeliest tokens and all others as one
    # outcome, which is a lower bound of the whole.
    kl_top_k: int | None = None
    confidence: float = CONFIDENCE  # of all intervals
    generation: GenerationCheck | None = None  # what the models write
    lm_eval: dict[str, Any] | None = None  # see `evaluation.harness.compare_tasks`

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return asdict(self)

    def with_(self, **changes: Any) -> "Evaluation":
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)


def scores_of(rows_by_domain: dict[str, Tensor]) -> tuple[dict[str, DomainScore], DomainScore]:
    """The scores of each domain, and of all as strata weighed by their tokens.

    Args:
        rows_by_domain: The sums over the predicted tokens of each row, (1 + c, R) float64: their number, then the
            first c of `MEASURES`.

    Raises:
        ValueError: A domain without a token to predict, or sums that are not finite.
    """
    estimates = {name: _estimates(name, rows) for name, rows in rows_by_domain.items()}
    tokens = {name: int(rows[0].sum()) for name, rows in rows_by_domain.items()}
    num_rows = {name: int((rows[0] > 0).sum()) for name, rows in rows_by_domain.items()}
    domains = {name: _score(tokens[name], num_rows[name], one) for name, one in estimates.items()}
    total = sum(tokens.values())
    weights = [number / total for number in tokens.values()]
    measures = next(iter(estimates.values()))
    overall = {name: stratified([one[name] for one in estimates.values()], weights) for name in measures}
    return domains, _score(total, sum(num_rows.values()), overall)


def _estimates(domain: str, rows: Tensor) -> dict[str, RatioEstimate]:
    """The estimate of each measure of one domain, and of the difference of the losses."""
    if rows[0].sum() == 0:
        raise ValueError(f"Domain {domain!r} has no token to predict: its rows have fewer than two real tokens.")
    counts, *sums = rows.numpy()
    found = {name: ratio_of_sums(values, counts) for name, values in zip(MEASURES, sums, strict=False)}
    means = [one.value for one in found.values()]
    if not all(map(math.isfinite, means)):
        raise ValueError(
            f"The scores of domain {domain!r} are not finite (loss, baseline loss, KL, agreement: {means}). "
            "Look for NaN or Inf in the weights, or load the models in bfloat16 or float32 instead of float16."
        )
    if "baseline_loss" in found:
        found["loss_increase"] = ratio_of_sums(sums[0] - sums[1], counts)
    return found


def _score(tokens: int, rows: int, found: dict[str, RatioEstimate]) -> DomainScore:
    loss = found["loss"]
    interval = loss.interval(low=0.0)
    score = DomainScore(
        tokens,
        loss.value,
        loss.standard_error,
        perplexity_of(loss.value),
        rows=rows,
        loss_interval=interval,
        perplexity_interval=interval and Interval(perplexity_of(interval.low), perplexity_of(interval.high)),
    )
    if "kl" not in found:
        return score
    baseline_loss, kl, agreement = (found[name] for name in MEASURES[1:])
    return dataclasses.replace(
        score,
        baseline_loss=baseline_loss.value,
        # The divergence is never negative; rounding in float32 can make it so where the models are all but equal.
        kl=max(kl.value, 0.0),
        top1_agreement=agreement.value,
        baseline_perplexity=perplexity_of(baseline_loss.value),
        loss_increase=found["loss_increase"].value,
        loss_increase_interval=found["loss_increase"].interval(),
        kl_interval=kl.interval(low=0.0),
        top1_agreement_interval=agreement.interval(low=0.0, high=1.0),
    )


def perplexity_of(loss: float) -> float:
    """`exp(loss)`, at most the largest power of e that a float holds."""
    return math.exp(min(loss, 700.0))
