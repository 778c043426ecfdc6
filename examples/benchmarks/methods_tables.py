"""Tables and picture of the benchmark of all methods; seeds of one result in one line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from hf_mcsmoe.recipe_reading import recipe_from_preset

FORWARDS, SECONDS = 1.5, 5.0  # what a method that is not sequential may take
SEARCHES = ("subset_search", "genetic_subset")  # among subsets of experts
LEAST_INCREASE = 1e-3  # nats; below it the logarithmic axis is linear


def write_tables(results: dict[str, list[dict]], path: Path) -> None:
    """All results, best first at each size; then time and memory of each method alone; Markdown."""
    runs = runs_of(results["compared"])
    done = [run for run in runs if "overall" in run[0]]
    done.sort(key=lambda run: (-run[0]["keep"], mean(run, increase)))
    domains = list(done[0][0]["domains"]) if done else []
    columns = ["method", "layout", "kept", "expert bytes", "loss increase", "KL", "top-1", *domains]
    lines = [f"Loss increase over the original in nats per token ({describe(done)}).", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for run in done:
        first = run[0]
        cells = [f"`{first['method']}`", first["layout"], f"{first['keep']:.0%}", f"{first['expert_bytes']:,}"]
        cells += [spread(run, increase, "{:+.4f}"), spread(run, lambda row: row["overall"]["kl"], "{:.4f}")]
        cells += [spread(run, lambda row: row["overall"]["top1_agreement"], "{:.1%}")]
        cells += [f"{mean(run, lambda row, name=name: increase(row, name)):+.3f}" for name in domains]
        lines.append("| " + " | ".join(cells) + " |")
    for run in runs:
        if run[0]["skipped"] is not None:
            first = run[0]
            lines += ["", f"Not done: `{first['method']}`, {first['layout']}, {first['keep']:.0%}: {first['skipped']}"]
    if results["alone"]:
        lines += ["", *alone_lines(results["alone"])]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def alone_lines(rows: Sequence[dict]) -> list[str]:
    """Time and memory of each method by itself, and which of them take longer than they should."""
    lines = ["Each method by itself, calibration included, beside a plain forward over the calibration tokens.", ""]
    lines += [
        f"A method that is neither sequential nor searches subsets nor trains should take at most {FORWARDS} times "
        f"the forward and {SECONDS:g} s. The column before the last one says by how much it takes longer (+) or not "
        "(-); a dash means that this is not asked of it.",
        "",
    ]
    lines += ["| method | layout | kept | seconds | x forward | over, s | extra memory, MB |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: row.get("seconds", 0)):
        if "seconds" in row:
            ratio, memory = row["seconds"] / row["forward_seconds"], row["extra_bytes"] / 1e6
            over = f"{seconds_over(row):+.1f}" if should_be_fast(row["method"]) else "-"
            cells = [f"`{row['method']}`", row["layout"], f"{row['keep']:.0%}", f"{row['seconds']:.1f}"]
            lines.append("| " + " | ".join([*cells, f"{ratio:.2f}", over, f"{memory:.0f}"]) + " |")
    held_to = [row for row in rows if "seconds" in row and should_be_fast(row["method"])]
    slow = sorted(row["method"] for row in held_to if seconds_over(row) > 0)
    names = ", ".join(f"`{name}`" for name in slow) or "none"
    return [*lines, "", f"Longer than that: {names}, of {len(held_to)}."]


def seconds_over(row: dict[str, Any]) -> float:
    """Seconds that a method took beyond what it should; negative within it."""
    return row["seconds"] - FORWARDS * row["forward_seconds"] - SECONDS


def should_be_fast(method: str) -> bool:
    """Whether a preset needs no more than one pass over the calibration tokens, and neither search nor training."""
    recipe = recipe_from_preset(method)
    return not recipe.sequential and recipe.matching is None and recipe.grouping not in SEARCHES


def write_plot(results: dict[str, list[dict]], path: Path) -> None:
    """Mean loss increase over the bytes of the experts, a line for each method; one picture a layout; PNG."""
    runs = [run for run in runs_of(results["compared"]) if "overall" in run[0]]
    layouts = sorted({run[0]["layout"] for run in runs})
    methods = sorted({run[0]["method"] for run in runs})
    palette = colormaps["tab20"]
    figure = Figure(figsize=(7 * len(layouts) + 2, 6), layout="constrained")
    for axis, layout in zip(figure.subplots(1, len(layouts), squeeze=False, sharey=True)[0], layouts, strict=True):
        lines = {name: [r for r in runs if r[0]["method"] == name and r[0]["layout"] == layout] for name in methods}
        lines = {name: line for name, line in lines.items() if line}
        for name, line in sorted(lines.items(), key=lambda item: sum(mean(run, increase) for run in item[1])):
            line.sort(key=lambda run: run[0]["expert_bytes"])
            place = methods.index(name)
            axis.plot(
                [run[0]["expert_bytes"] / 1e6 for run in line],
                [mean(run, increase) for run in line],
                label=name,
                color=palette(place % palette.N),
                linestyle="-" if place < palette.N else ":",
                marker="o",
                markersize=3,
            )
        axis.set_yscale("symlog", linthresh=LEAST_INCREASE)
        axis.set_title(layout)
        axis.set_xlabel("bytes of experts, MB")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="xx-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.axes[0].set_ylabel("loss increase, nats per token")
    figure.savefig(path, dpi=110)


def runs_of(rows: Sequence[dict]) -> list[list[dict]]:
    """Rows that differ in nothing but the seed, together."""
    runs: dict[tuple, list[dict]] = {}
    for row in rows:
        runs.setdefault((row["method"], row["layout"], row["keep"]), []).append(row)
    return list(runs.values())


def describe(runs: Sequence[Sequence[dict]]) -> str:
    """How often and on what was measured."""
    if not runs:
        return "no result"
    seeds = sorted({row["seed"] for run in runs for row in run})
    first = runs[0][0]["overall"]
    return (
        f"{first['baseline_loss']:.4f} on {first['tokens']:,} tokens; calibration seeds {seeds}: mean, least and "
        "largest in brackets where there are several"
    )


def increase(row: dict[str, Any], domain: str | None = None) -> float:
    """Nats per token over the original, of one domain or of all."""
    score = row["overall"] if domain is None else row["domains"][domain]
    return score["loss"] - score["baseline_loss"]


def mean(run: Sequence[dict], read: Callable[[dict], float]) -> float:
    """Mean over the seeds."""
    return sum(map(read, run)) / len(run)


def spread(run: Sequence[dict], read: Callable[[dict], float], form: str) -> str:
    """The mean, and least and largest of several."""
    values = sorted(map(read, run))
    text = form.format(sum(values) / len(values))
    return text if len(values) == 1 else f"{text} ({form.format(values[0])} to {form.format(values[-1])})"
