"""What the fidelity benchmark calibrates on and tests on, by domain."""

import json
from pathlib import Path
from typing import Any

from hf_mcsmoe import Calibration, load_calibration
from hf_mcsmoe.evaluation import load_evaluation_data

ASSETS = Path(__file__).parents[2] / "hf_mcsmoe" / "assets"


def named_files(entries: list[str]) -> dict[str, str]:
    """`name=path` or a path, which is named after the file: name -> path.

    Raises:
        ValueError: Two entries have one name, or there is no such file.
    """
    files = {}
    for entry in entries:
        name, separator, path = entry.partition("=")
        name, path = (name, path) if separator else (Path(entry).stem, entry)
        if name in files:
            raise ValueError(f"{name!r} names two files, {files[name]!r} and {path!r}. Give names as name=path.")
        if not Path(path).is_file():
            raise ValueError(f"There is no file {path!r}. Give a .npy of token ids, .txt, .jsonl or .parquet.")
        files[name] = path
    return files


def calibration_sources(entries: list[str]) -> dict[str, Any]:
    """What to calibrate on by domain; a single .jsonl file with a column "domain" is one source a domain."""
    files = named_files(entries)
    sources: dict[str, Any] = {}
    for name, path in files.items():
        rows = [json.loads(line) for line in Path(path).open(encoding="utf-8")] if path.endswith(".jsonl") else []
        if not rows or "domain" not in rows[0]:
            sources[name] = path
            continue
        for row in rows:
            sources.setdefault(row["domain"], []).append({"text": row["text"]})
    return sources


def calibration_without(
    sources: dict[str, Any], left_out: str | None, tokenizer: Any, rows: int | None, seed: int
) -> Calibration:
    """One set of batches of all domains but one; `rows` is the most of each domain.

    Raises:
        ValueError: `left_out` is no domain, or the only one.
    """
    kept = {name: source for name, source in sources.items() if name != left_out}
    if left_out is not None and (left_out not in sources or not kept):
        raise ValueError(
            f"--leave-out is {left_out!r}, the calibration domains are {sorted(sources)}. Name one of several; "
            "--calibration takes name=path more than once."
        )
    parts = [load_calibration(source, tokenizer, num_samples=rows, seed=seed) for source in kept.values()]
    batches = [batch for part in parts for batch in part.batches]
    batches.sort(key=lambda batch: batch.held_out)  # stable: held-out rows last, as load_calibration has them
    return Calibration(tuple(batches), ", ".join(kept))


def evaluation_data(entries: list[str], tokenizer: Any, rows: int | None) -> dict[str, Calibration]:
    """Batches to test on by domain, at most `rows` rows of each."""
    if not entries:
        return load_evaluation_data(None, tokenizer, num_samples=rows)
    data = {}
    for name, path in named_files(entries).items():
        domains = load_evaluation_data(path, tokenizer, num_samples=rows)
        data |= {name if len(domains) == 1 else domain: batches for domain, batches in domains.items()}
    return data
