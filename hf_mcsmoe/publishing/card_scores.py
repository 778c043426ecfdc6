"""What the model card says of the evaluation: tables, and limitations that follow from the measurements."""

import math
from collections.abc import Mapping
from typing import Any

NOT_EVALUATED = "not evaluated"
FOUR_DIGITS = "{:#.4g}"
ALWAYS_OPEN = ("other domains and languages", "long contexts", "safety")
Scores = Mapping[str, Any]


def score_sections(scores: Scores | None) -> dict[str, Any]:
    """The parts of the template about the evaluation.

    Args:
        scores: See `Evaluation.to_dict`; None: not evaluated. Those of older reports have no intervals.
    """
    if not scores:
        return dict.fromkeys(("evaluation", "generation", "benchmarks"))
    return {
        "evaluation": {
            "rows": _domain_rows(scores),
            "confidence": f"{scores.get('confidence', 0.95):.0%}",
            "top_k": scores.get("kl_top_k"),
            "sources": [f"{plain(name)}: `{plain(source)}`" for name, source in scores.get("sources", {}).items()],
        },
        "generation": _generation(scores.get("generation")),
        "benchmarks": _benchmarks(scores.get("lm_eval")),
    }


def score_limits(scores: Scores | None) -> list[str]:
    """Limitations of the model as far as the scores show them, and what was not looked at."""
    if not scores:
        return ["How well the model predicts or writes text was not evaluated. Evaluate it on your task before use."]
    limits = [_loss_limit(scores)]
    if scores.get("generation"):
        limits += _writing_limits(scores["generation"])
    left = [] if scores.get("generation") else ["what the model writes"]
    left += [] if scores.get("lm_eval") else ["benchmarks"]
    return [*limits, f"{NOT_EVALUATED.capitalize()}: {', '.join([*left, *ALWAYS_OPEN])}."]


def plain(text: str) -> str:
    """Text from outside on one line, safe in a cell of a table and as HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _domain_rows(scores: Scores) -> list[list[str]]:
    rows = []
    bound = "≥ " if scores.get("kl_top_k") else ""
    for name, score in [*scores["domains"].items(), ("all", scores["overall"])]:
        kl = _with_interval(score["kl"], score.get("kl_interval"), "{:.4f}")
        rows.append(
            [
                plain(name),
                f"{score['tokens']:,}",
                _perplexity(score["baseline_loss"]),
                _with_interval(score["perplexity"], score.get("perplexity_interval"), FOUR_DIGITS),
                _with_interval(_increase(score), score.get("loss_increase_interval"), "{:+.4f}"),
                kl if score["kl"] is None else f"{bound}{kl}",
                _with_interval(score["top1_agreement"], score.get("top1_agreement_interval"), "{:.1%}"),
            ]
        )
    return rows


def _generation(check: Scores | None) -> dict[str, Any] | None:
    if not check:
        return None
    kinds = (
        (f"repeated {check['ngram']}-grams", "repetition", "{:.1%}"),
        ("ended by itself", "ended", "{:.1%}"),
        ("tokens", "length", "{:.1f}"),
    )
    rows = [
        [
            name,
            _estimate(check[key]["baseline"], form),
            _estimate(check[key]["value"], form),
            _estimate(check[key]["increase"], form.replace("{:", "{:+")),
        ]
        for name, key, form in kinds
        if check[key] is not None
    ]
    same = check["same_prefix"]
    return {
        "rows": rows,
        "prompts": check["prompts"],
        "source": plain(check["prompt_source"]),
        "ngram": check["ngram"],
        "max_new_tokens": check["max_new_tokens"],
        "same_prefix": None if same is None else _estimate(same, "{:.1%}"),
    }


def _benchmarks(found: Scores | None) -> dict[str, Any] | None:
    if not found:
        return None
    rows = []
    for name, task in found["tasks"].items():
        for metric, one in task["metrics"].items():
            rows.append(
                [
                    plain(name),
                    plain(metric),
                    "-" if task["documents"] is None else f"{task['documents']:,}",
                    "-" if task["num_fewshot"] is None else str(task["num_fewshot"]),
                    _with_interval(one["baseline"], None, "{:.4f}"),
                    _with_interval(one["value"], one["interval"], "{:.4f}"),
                    _with_interval(one["increase"], one["increase_interval"], "{:+.4f}"),
                ]
            )
    return {"rows": rows, "version": found["version"]}


def _loss_limit(scores: Scores) -> str:
    if scores["overall"]["baseline_loss"] is None:
        return f"The loss of quality against the base model was {NOT_EVALUATED}."
    domains = scores["domains"]
    ordered = sorted(domains, key=lambda name: -_increase(domains[name]))
    listed = ", ".join(f"{plain(name)} ({_loss_increase(domains[name])})" for name in ordered)
    return f"Increase of the loss in nats per token against the base model, worst domain first: {listed}."


def _writing_limits(check: Scores) -> list[str]:
    """Whether the model loops, ends and goes on differently; clear where an interval leaves 0 out."""
    repetition, form = check["repetition"], "{:.1%}"
    own = _estimate(repetition["value"], form)
    if repetition["baseline"] is None:
        return [f"Of the {check['ngram']}-grams it writes, {own} occurred before in the same text."]
    base, change = _estimate(repetition["baseline"], form), _estimate(repetition["increase"], "{:+.1%}")
    verdict = {
        1: "It repeats itself more than the base model",
        -1: "It repeats itself less than the base model",
        0: "Whether it repeats itself more than the base model is open",
    }[_sign(repetition["increase"]["interval"])]
    limits = [
        f"{verdict}: {own} of its {check['ngram']}-grams occurred before, {base} of the base model's ({change})."
    ]
    ended = check["ended"]
    if ended is not None and _sign(ended["increase"]["interval"]):
        shares = (_estimate(ended[key], form) for key in ("value", "baseline"))
        limits.append("It ends texts by itself in {} of the cases, the base model in {}.".format(*shares))
    return limits


def _sign(interval: Mapping[str, float] | None) -> int:
    """Of all values in an interval; 0 where it holds 0, or for none."""
    if interval is None or interval["low"] <= 0 <= interval["high"]:
        return 0
    return 1 if interval["low"] > 0 else -1


def _increase(score: Scores) -> float | None:
    """Of the loss; reports of older versions do not hold it."""
    if score["baseline_loss"] is None:
        return None
    increase = score.get("loss_increase")
    return score["loss"] - score["baseline_loss"] if increase is None else increase


def _loss_increase(score: Scores) -> str:
    return _with_interval(_increase(score), score.get("loss_increase_interval"), "{:+.4f}")


def _perplexity(loss: float | None) -> str:
    return NOT_EVALUATED if loss is None else _written(math.exp(min(loss, 700.0)), FOUR_DIGITS)


def _estimate(found: Scores | None, form: str) -> str:
    return NOT_EVALUATED if found is None else _with_interval(found["value"], found["interval"], form)


def _with_interval(value: float | None, interval: Mapping[str, float] | None, form: str) -> str:
    """A number and its interval: 1.4729 [1.3899, 1.5559]."""
    if value is None:
        return NOT_EVALUATED
    if interval is None:
        return _written(value, form)
    return f"{_written(value, form)} [{_written(interval['low'], form)}, {_written(interval['high'], form)}]"


def _written(value: float, form: str) -> str:
    return form.format(value).rstrip(".")  # four digits of 1234 would end in a point
