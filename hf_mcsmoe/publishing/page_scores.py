"""What the report page says of the quality of a model."""

import math
from collections.abc import Mapping
from typing import Any

from .card_text import NOT_EVALUATED, count
from .page_table import Table, plain, words

SCORES_SHOWN = ("domains", "overall", "sources", "baseline", "confidence", "kl_top_k")  # by `scores_table`
# What an evaluation of two models calls a number of both, and what the columns are called.
COMPARED = {"baseline": "base model", "value": "this model", "increase": "increase"}


def scores_table(scores: Mapping[str, Any]) -> Table:
    """Scores by domain and of all, with intervals where there are any; see `Evaluation.to_dict`."""
    columns = ["domain", "tokens", "perplexity of the base model", "perplexity", "loss (nats)"]
    columns += ["increase of the loss (nats)", "KL (nats)", "same top-1"]
    rows = []
    for name, score in [*scores["domains"].items(), ("all", scores["overall"])]:
        base, error = score.get("baseline_loss"), score.get("loss_standard_error")
        increase = None if base is None else score["loss"] - base
        rows.append(
            [
                name,
                count(score["tokens"]),
                NOT_EVALUATED if base is None else _perplexity(math.exp(min(base, 700.0))),
                _perplexity(score["perplexity"]),
                f"{score['loss']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
                _with_interval(increase, score.get("loss_increase_interval"), "{:+.4f}"),
                _with_interval(score.get("kl"), score.get("kl_interval"), "{:.4f}"),
                _with_interval(score.get("top1_agreement"), score.get("top1_agreement_interval"), "{:.1%}"),
            ]
        )
    return Table(columns, rows, notes=_about_scores(scores))


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.4g}"


def _with_interval(value: float | None, interval: Mapping[str, float] | None, form: str) -> str:
    """The number, and its interval in brackets if it has one."""
    if value is None:
        return NOT_EVALUATED
    if interval is None:
        return form.format(value)
    return f"{form.format(value)} [{form.format(interval['low'])}, {form.format(interval['high'])}]"


def _about_scores(scores: Mapping[str, Any]) -> list[str]:
    notes = [f"{name}: {source}" for name, source in scores.get("sources", {}).items()]
    if scores.get("baseline"):
        notes.append(f"Base model: {scores['baseline']}.")
    if scores.get("kl_top_k"):
        notes.append(
            f"KL over the {count(scores['kl_top_k'])} tokens that the base model finds likeliest, and all others as "
            "one outcome: a lower bound."
        )
    if scores.get("confidence"):
        notes.append(f"In brackets: {scores['confidence']:.0%} confidence intervals.")
    return notes


def more_scores(scores: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Everything else that was measured: what compares both models in columns, the rest as names and values."""
    more = {name: value for name, value in scores.items() if name not in SCORES_SHOWN and value not in (None, {}, [])}
    return [(words(name), _more(value)) for name, value in more.items()]


def _more(value: Any) -> Table:
    compared = {}
    if isinstance(value, Mapping):
        compared = {name: one for name, one in value.items() if isinstance(one, Mapping) and set(one) == set(COMPARED)}
    if not compared:
        return Table(["", "value"], flattened(value))
    rows = [[words(name), *(flattened(one[column])[0][1] for column in COMPARED)] for name, one in compared.items()]
    others = {name: one for name, one in value.items() if name not in compared}
    notes = [": ".join(row) for row in flattened(others)] if others else []
    return Table(["", *COMPARED.values()], rows, notes=notes)


def flattened(value: Any, name: str = "") -> list[list[str]]:
    """Nested values as rows (path, value): floats with four digits, an estimate and its interval together."""
    if isinstance(value, Mapping) and set(value) == {"value", "interval"}:
        return [[words(name), _with_interval(value["value"], value["interval"], "{:.4g}")]]
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in flattened(item, f"{name}, {key}" if name else str(key))]
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        return [row for place, item in enumerate(value) for row in flattened(item, f"{name} {place + 1}".strip())]
    return [[words(name), plain(value)]]
