"""The short table of the README: every method at one size, from the results of methods.py.

    python examples/benchmarks/methods_summary.py examples/benchmarks/results/methods/methods.json --write README.md

Without --write it is printed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from methods_tables import increase, mean, runs_of

from hf_mcsmoe.family_table import insert

KEEP = 0.5
MARK = "results"


def summary(results: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each method, best first; losses are means over the seeds. Markdown."""
    runs = [run for run in runs_of(results["compared"]) if run[0]["keep"] == KEEP and "overall" in run[0]]
    increases = {(run[0]["method"], run[0]["layout"]): mean(run, increase) for run in runs}
    alone = {row["method"]: row for row in results["alone"] if "seconds" in row}
    lines = ["| method | mapped | native | time, forwards | extra memory, MB |", "|---|---:|---:|---:|---:|"]
    best = {name: min(v for (other, _), v in increases.items() if other == name) for name, _ in increases}
    for name in sorted(best, key=lambda name: best[name]):
        cells = [f"`{name}`"]
        found = (increases.get((name, layout)) for layout in ("mapped", "native"))
        cells += ["-" if value is None else f"{value:+.3f}" for value in found]
        row = alone.get(name)
        cells += ["-", "-"] if row is None else [f"{row['seconds'] / row['forward_seconds']:.1f}"]
        cells += [] if row is None else [f"{row['extra_bytes'] / 1e6:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="methods.json")
    parser.add_argument("--write", type=Path, metavar="README", help="put the table between the markers of this file")
    args = parser.parse_args()
    table = summary(json.loads(args.results.read_text(encoding="utf-8")))
    if args.write is None:
        print(table)
    else:
        args.write.write_text(insert(args.write.read_text(encoding="utf-8"), table, MARK), encoding="utf-8")


if __name__ == "__main__":
    main()
