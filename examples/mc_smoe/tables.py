"""Results of several seeds as Markdown: mean and spread."""

import statistics
from typing import Any

COLUMNS = {
    "accuracy": ("accuracy %", 100.0, 1),
    "loss": ("loss (nats)", 1.0, 3),
    "accuracy_before": ("accuracy % before recovery", 100.0, 1),
    "loss_before": ("loss before recovery", 1.0, 3),
    "parameters": ("parameters", 1.0, 0),
    "bytes": ("bytes on disk", 1.0, 0),
    "flops": ("MFLOPs a name", 1e-6, 2),
    "tokens_per_second": ("tokens/s", 1.0, 0),
    "speed": ("speed / full's", 1.0, 2),
}


def mean_and_spread(values: list[float], digits: int) -> str:
    """ "mean ± sample standard deviation", the latter where there are several different values."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    if len(values) < 2 or max(values) == min(values):
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def with_speed(result: dict[str, Any]) -> dict[str, Any]:
    """A result with its speed as a multiple of that of the full model, which was measured in turns with it."""
    full = result.get("full_tokens_per_second")
    return result if full is None else {**result, "speed": result["tokens_per_second"] / full}


def cell(results: list[dict[str, Any]], column: str) -> str:
    """One column of one model over its seeds; "" where it was not measured."""
    _, factor, digits = COLUMNS[column]
    values = [result[column] * factor for result in map(with_speed, results) if result.get(column) is not None]
    return mean_and_spread(values, digits) if values else ""


def results_table(results: list[dict[str, Any]], columns: tuple[str, ...] = tuple(COLUMNS)) -> str:
    """A Markdown table of results {"model", "seed", columns ...}: one row a model, in order of appearance."""
    models = list(dict.fromkeys(result["model"] for result in results))
    lines = ["| model | seeds | " + " | ".join(COLUMNS[column][0] for column in columns) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for model in models:
        own = [result for result in results if result["model"] == model]
        cells = " | ".join(cell(own, column) for column in columns)
        lines.append(f"| {model} | {len(own)} | {cells} |")
    return "\n".join(lines)


def savings(results: list[dict[str, Any]], model: str, against: str = "full") -> dict[str, float]:
    """Share of parameters, bytes and FLOPs that a model saves, and the accuracy it loses, means over common seeds."""
    by_key = {(result["model"], result["seed"]): result for result in results}
    pairs = [(one, by_key[against, seed]) for (name, seed), one in by_key.items() if name == model]
    saved = {
        f"{column}_saved": statistics.fmean(1 - one[column] / full[column] for one, full in pairs)
        for column in ("parameters", "bytes", "flops")
    }
    return {**saved, "accuracy_lost": statistics.fmean(full["accuracy"] - one["accuracy"] for one, full in pairs)}
