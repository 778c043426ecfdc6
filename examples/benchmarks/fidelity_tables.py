"""Tables and plot of the fidelity benchmark."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window
from matplotlib import pyplot

LEAST_KL = 1e-5  # what the logarithmic axis starts with
COLUMNS = [
    ("recipe", lambda run: run[0]["recipe"]),
    ("layout", lambda run: run[0]["layout"] or "-"),
    ("calibrated without", lambda run: run[0]["left_out"] or "-"),
    ("weights", lambda run: run[0]["weights"]),
    ("kept", lambda run: f"{run[0]['keep']:.0%}"),
    ("expert bytes", lambda run: f"{run[0]['expert_bytes']:,}"),
    ("loss increase", lambda run: _spread(run, lambda row: row["overall"]["loss_increase"], "{:+.4f}")),
    ("KL", lambda run: _spread(run, lambda row: row["overall"]["kl"], "{:.4f}")),
    ("top-1 agreement", lambda run: _spread(run, lambda row: row["overall"]["top1_agreement"], "{:.1%}")),
    ("seconds", lambda run: _spread(run, lambda row: row.get("seconds"), "{:.1f}")),
    ("x forward", lambda run: _spread(run, lambda row: row.get("times_forward"), "{:.1f}")),
    ("extra memory, MB", lambda run: _spread(run, lambda row: row.get("extra_bytes", 0) / 1e6 or None, "{:.0f}")),
    ("tokens/s", lambda run: _spread(run, lambda row: row.get("tokens_per_second"), "{:,.0f}")),
]


def write_tables(rows: list[dict], path: Path) -> None:
    """All results, then the loss increase by domain, in Markdown; seeds of one result in one line."""
    runs = _runs(rows)
    settings = ", ".join(f"{name} {value}" for name, value in rows[0]["settings"].items() if value is not None)
    lines = [f"# Fidelity of {rows[0]['settings']['model']}", "", settings + ".", ""]
    lines += [f"Several seeds: their mean, and least to largest in brackets. Loss of the original: {_loss(rows)}.", ""]
    lines += _table([name for name, _ in COLUMNS], [[read(run) for _, read in COLUMNS] for run in runs])
    domains = list(dict.fromkeys(domain for row in rows for domain in row["domains"]))
    if len(domains) > 1 or rows[0]["left_out"] is not None:
        lines += ["", "Loss increase by domain:", ""]
        names = [name for name, _ in COLUMNS[:5]]
        body = [[read(run) for _, read in COLUMNS[:5]] + [_domain(run, domain) for domain in domains] for run in runs]
        lines += _table([*names, *domains], body)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_plot(rows: list[dict], path: Path) -> None:
    """Loss increase and KL over the bytes of the experts, a line for each recipe, dashed with 8-bit weights."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    runs = [run for run in _runs(rows) if run[0]["left_out"] is None] or _runs(rows)
    names = list(dict.fromkeys(run[0]["recipe"] for run in runs))
    for name, is_int8 in [(name, is_int8) for name in names for is_int8 in (False, True)]:
        line = [run for run in runs if run[0]["recipe"] == name and (run[0]["weights"] == "int8") == is_int8]
        line.sort(key=lambda run: run[0]["expert_bytes"])
        sizes = [run[0]["expert_bytes"] / 1e6 for run in line]
        style = {"color": f"C{names.index(name) % 10}", "linestyle": "--" if is_int8 else "-", "marker": "o"}
        label = f"{name}, 8 bits" if is_int8 else name
        axes[0].plot(sizes, [_mean(run, "loss_increase") for run in line], label=label, **style)
        axes[1].plot(sizes, [max(LEAST_KL, _mean(run, "kl")) for run in line], label=label, **style)
    axes[0].set_yscale("symlog", linthresh=1e-3)
    axes[1].set_yscale("log")
    for axis, title in zip(axes, ("loss increase, nats per token", "KL to the original, nats per token"), strict=True):
        axis.set_xlabel("bytes of experts, MB")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _runs(rows: list[dict]) -> list[list[dict]]:
    """Rows that differ in the seed alone, together; the largest first, then the best."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["keep"], row["weights"], row["left_out"]), []).append(row)
    return sorted(groups.values(), key=lambda run: (-run[0]["keep"], run[0]["weights"] == "int8", _mean(run, "kl")))


def _mean(run: list[dict], name: str) -> float:
    return sum(row["overall"][name] for row in run) / len(run)


def _spread(run: list[dict], read: Callable[[dict], Any], written: str) -> str:
    values = [value for row in run if (value := read(row)) is not None]
    if not values:
        return "-"
    mean = written.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} [{written.format(min(values))}, {written.format(max(values))}]"


def _domain(run: list[dict], domain: str) -> str:
    has = [row for row in run if domain in row["domains"]]
    return _spread(has, lambda row: row["domains"][domain]["loss_increase"], "{:+.4f}")


def _loss(rows: list[dict]) -> str:
    original = next(row for row in rows if row["recipe"] == "original")
    return f"{original['overall']['loss']:.4f} on {original['overall']['tokens']:,} tokens"


def _table(names: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *body)]
