"""Text to evaluate on -> batches by domain."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..calibration import Calibration, load_calibration
from ..calibration.sources import Source, open_source

EVALUATION_TEXT = Path(__file__).parents[1] / "assets" / "evaluation.jsonl"
DEFAULT_SEQUENCE_LENGTH = 256


def load_evaluation_data(
    source: Any,
    tokenizer: Any,
    *,
    sequence_length: int | None = None,
    num_samples: int | None = None,
    batch_size: int = 8,
    vocab_size: int | None = None,
) -> dict[str, Calibration]:
    """Evaluation batches by domain, nothing of them held out.

    Args:
        source: Whatever `load_calibration` accepts; None takes the evaluation text that ships with hf_mcsmoe. Rows
            with a column "domain" are grouped by it. Without one there is one domain, named after the file, or
            "data" for what is no file. A `Calibration` is one domain as it is, a stream is never grouped.
        tokenizer: Needed for text and chats; documents of a domain are joined and cut into full rows.
        sequence_length: Most tokens in a row. None: 256 for text, rows as they are for everything else.
        num_samples: Most rows of a domain, sampled under a fixed seed. None: all of them (256 of a stream of text).
        batch_size: Most rows in a batch.
        vocab_size: Token ids must be below it, if given.

    Raises:
        ValueError: A row without a domain after a first row with one, or whatever `load_calibration` refuses.
        TypeError: See `load_calibration`.
    """
    if isinstance(source, Calibration):
        return {"data": load_calibration(source, vocab_size=vocab_size)}
    source = EVALUATION_TEXT if source is None else source
    opened = open_source(source)
    is_text = opened.kind in ("text", "conversation")
    if is_text and sequence_length is None:
        sequence_length = DEFAULT_SEQUENCE_LENGTH
    groups = _rows_by_domain(opened, Path(source).stem if isinstance(source, str | os.PathLike) else "data")
    data = {}
    for name, rows in groups.items():
        most = num_samples
        if most is None and is_text and not opened.is_stream:
            most = _most_rows(replace(opened, items=rows), sequence_length)
        domain = load_calibration(
            rows,
            tokenizer,
            num_samples=most,
            sequence_length=sequence_length,
            batch_size=batch_size,
            held_out_fraction=0.0,
            vocab_size=vocab_size,
            text_column=opened.column,
        )
        data[name] = replace(domain, source=opened.description + (f", domain {name}" if len(groups) > 1 else ""))
    return data


def _rows_by_domain(source: Source, default: str) -> dict[str, Any]:
    rows = source.items
    if source.is_stream or source.column is None or "domain" not in rows[0]:
        return {default: rows}
    grouped: dict[str, list] = {}
    for number in range(len(rows)):
        domain = rows[number].get("domain")
        if not isinstance(domain, str):
            raise ValueError(
                f"Row {number} of the {source.description} has the domain {domain!r}, but it must be a string. "
                "Give every row one, or take the column out."
            )
        grouped.setdefault(domain, []).append(rows[number])
    return grouped


def _most_rows(source: Source, sequence_length: int) -> int:
    """More rows than the texts can fill: tokenizers make at most a token a byte, and some special ones."""
    return sum(len(str(value).encode()) + 64 for _, value in source.values()) // sequence_length + 1
