"""Results of `compare_methods` as a Markdown table and as a picture of quality over bytes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .compare import ComparedResult

MARKERS = {"mapped": "o", "native": "s"}
LEAST_INCREASE = 1e-3  # nats; below it the logarithmic axis is linear


def comparison_table(results: Sequence[ComparedResult]) -> str:
    """One line a result, best first at each size, with the loss increase of every domain where there are several."""
    done = [result for result in results if result.evaluation is not None]
    if not done:
        return "No method gave a result.\n" + skipped_lines(results)
    first = done[0].evaluation
    domains = list(first["domains"]) if len(first["domains"]) > 1 else []
    columns = ["method", "layout", "kept", "expert bytes", "perplexity", "loss increase", "KL", "same top token"]
    columns += ["seconds", *(f"{domain}, increase" for domain in domains)]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for result in sorted(done, key=lambda one: (-one.keep, one.loss_increase)):
        lines.append("| " + " | ".join(cells(result, domains)) + " |")
    overall = first["overall"]
    head = f"Loss of the original: {overall['baseline_loss']:.4f} nats on {overall['tokens']:,} tokens."
    return "\n".join([head, "", *lines, ""]) + skipped_lines(results)


def cells(result: ComparedResult, domains: Iterable[str]) -> list[str]:
    """One line of the table."""
    score = result.evaluation["overall"]
    by_domain = [result.evaluation["domains"][domain] for domain in domains]
    return [
        result.method,
        result.layout,
        f"{result.keep:.0%}",
        f"{result.expert_bytes:,}",
        f"{score['perplexity']:.2f}",
        f"{result.loss_increase:+.4f}",
        f"{score['kl']:.4f}",
        f"{score['top1_agreement']:.1%}",
        f"{result.seconds:.1f}",
        *(f"{domain['loss'] - domain['baseline_loss']:+.4f}" for domain in by_domain),
    ]


def skipped_lines(results: Iterable[ComparedResult]) -> str:
    """Why methods gave no result, one line each."""
    skipped = [one for one in results if one.skipped is not None]
    return "".join(f"\nNot done: {one.method}, {one.layout}, {one.keep:.0%}: {one.skipped}\n" for one in skipped)


def plot_comparison(results: Iterable[ComparedResult], path: Path) -> None:
    """Loss increase over the bytes of the experts, a line for each method and layout; PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_class, palette = import_matplotlib()
    lines: dict[tuple[str, str], list[ComparedResult]] = {}
    for result in results:
        if result.evaluation is not None:
            lines.setdefault((result.method, result.layout), []).append(result)
    figure = figure_class(figsize=(10, 6), layout="constrained")
    axis = figure.subplots()
    methods = list(dict.fromkeys(method for method, _ in lines))
    # Best first, so that the legend reads like the picture.
    for (method, layout), line in sorted(lines.items(), key=lambda item: mean_increase(item[1])):
        line = sorted(line, key=lambda one: one.expert_bytes)
        place = methods.index(method)
        axis.plot(
            [one.expert_bytes / 1e6 for one in line],
            [one.loss_increase for one in line],
            label=f"{method}, {layout}",
            color=palette(place % palette.N),
            linestyle="-" if layout == "mapped" else "--",
            marker=MARKERS[layout],
            markersize=4,
        )
    axis.set_yscale("symlog", linthresh=LEAST_INCREASE)
    axis.set_xlabel("bytes of experts, MB")
    axis.set_ylabel("loss increase over the original, nats per token")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=120)


def mean_increase(line: Sequence[ComparedResult]) -> float:
    """Mean loss increase of the results of one method."""
    return sum(one.loss_increase for one in line) / len(line)


def import_matplotlib() -> tuple[Any, Any]:
    """(Figure, a palette of 20 colours); no window is ever opened.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib. Install it: pip install matplotlib") from error
    return Figure, colormaps["tab20"]
