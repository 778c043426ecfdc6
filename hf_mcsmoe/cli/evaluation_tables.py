"""The scores of an evaluation as tables for people."""

from typing import TYPE_CHECKING, Any

import typer

from .tables import print_table

if TYPE_CHECKING:
    from ..evaluation import DomainScore, Evaluation, Interval
    from ..evaluation.generation import Estimate, GenerationCheck


def show(scores: "Evaluation") -> None:
    """Print everything that was measured."""
    show_losses(scores)
    if scores.generation is not None:
        show_generation(scores.generation)
    if scores.lm_eval is not None:
        show_tasks(scores.lm_eval)
    typer.echo(
        f"In brackets: {scores.confidence:.0%} confidence intervals; rows, prompts and documents are independent."
    )
    if scores.kl_top_k is not None:
        typer.echo(
            f"KL: over the baseline's {scores.kl_top_k} likeliest tokens and all others as one outcome, a lower bound."
        )


def show_losses(scores: "Evaluation") -> None:
    """Print the table of the domains."""
    columns = ["domain", "tokens", "perplexity"]
    has_baseline = scores.overall.kl is not None
    if has_baseline:
        columns += ["baseline", "loss increase (nats)", "KL (nats)", "same top token"]
    rows = []
    for name, score in [*scores.domains.items(), ("all", scores.overall)]:
        row = [name, f"{score.tokens:,}", cell(score.perplexity, score.perplexity_interval, "{:.2f}")]
        rows.append(row + (compared(score) if has_baseline else []))
    print_table("Evaluation", columns, rows)


def compared(score: "DomainScore") -> list[str]:
    """Cells of one domain beside a baseline."""
    return [
        f"{score.baseline_perplexity:.2f}",
        cell(score.loss_increase, score.loss_increase_interval, "{:+.4f}"),
        cell(score.kl, score.kl_interval, "{:.4f}"),
        cell(score.top1_agreement, score.top1_agreement_interval, "{:.1%}"),
    ]


def show_generation(check: "GenerationCheck") -> None:
    """Print the table of the generation check."""
    measures = [
        (f"repeated {check.ngram}-grams", check.repetition, "{:.1%}"),
        ("ended by itself", check.ended, "{:.1%}"),
        ("tokens", check.length, "{:.1f}"),
    ]
    has_baseline = check.same_prefix is not None
    columns = ["", "model", *(["baseline", "increase"] if has_baseline else [])]
    rows = []
    for name, measure, form in measures:
        if measure is None:
            rows.append([name, "no token ends a text", *(["", ""] if has_baseline else [])])
            continue
        signed = form.replace(":", ":+")
        others = [estimate(measure.baseline, form), estimate(measure.increase, signed)] if has_baseline else []
        rows.append([name, estimate(measure.value, form), *others])
    if has_baseline:
        rows.append(["begins as the baseline's", estimate(check.same_prefix, "{:.1%}"), "", ""])
    print_table(f"Greedy text, at most {check.max_new_tokens} tokens, prompts: {check.prompts}", columns, rows)


def show_tasks(found: dict[str, Any]) -> None:
    """Print the table of lm-eval's tasks."""
    rows = []
    for name, task in found["tasks"].items():
        for metric, one in task["metrics"].items():
            base = "-" if one["baseline"] is None else f"{one['baseline']:.4f}"
            increase = (
                "-" if one["increase"] is None else plain_cell(one["increase"], one["increase_interval"], "{:+.4f}")
            )
            value = plain_cell(one["value"], one["interval"], "{:.4f}")
            rows.append([name, metric, str(task["documents"] or "-"), value, base, increase])
    columns = ["task", "metric, filter", "documents", "value", "baseline", "increase"]
    print_table(f"lm-eval {found['version']}", columns, rows)


def estimate(found: "Estimate | None", form: str) -> str:
    """A mean with its interval below it; a dash for none."""
    return "-" if found is None else cell(found.value, found.interval, form)


def cell(value: float, interval: "Interval | None", form: str) -> str:
    """A number with its interval below it."""
    if interval is None:
        return form.format(value)
    return f"{form.format(value)}\n[{form.format(interval.low)}, {form.format(interval.high)}]"


def plain_cell(value: float, interval: dict[str, float] | None, form: str) -> str:
    """The same for an interval as the report holds it."""
    from ..evaluation import Interval

    return cell(value, None if interval is None else Interval(**interval), form)
