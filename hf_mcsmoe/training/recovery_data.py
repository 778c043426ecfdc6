"""Text of a user -> examples to recover a model with, and the ones that are held out to measure it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..calibration.sources import open_source
from ..evaluation.data import load_evaluation_data
from .targets import Task
from .token_losses import IGNORED

logger = logging.get_logger(__name__)

DEFAULT_TEXT = Path(__file__).parents[1] / "assets" / "calibration.jsonl"
DEFAULT_SEQUENCE_LENGTH = 512
HELD_OUT_EVERY = 16  # rows of each domain
# Columns of examples that are no plain text, by task.
COLUMNS = {"seq2seq": ("input", "target"), "classification": ("text", "label")}
Example = dict[str, Any]  # input_ids, and labels where they are not the input_ids: list[int] or int


@dataclass(frozen=True, eq=False)
class RecoveryData:
    """Tokenised examples.

    Raises:
        ValueError: There is nothing to train on or nothing to measure with.
    """

    train: list[Example]
    held_out: list[Example]
    sources: list[str]  # what they are, in words

    def __post_init__(self) -> None:
        if not self.train or not self.held_out:
            raise ValueError(
                f"The data ({', '.join(self.sources)}) gives {len(self.train)} rows to train and {len(self.held_out)} "
                "to measure with. Give more text, or a smaller sequence_length."
            )

    def fingerprint(self) -> dict[str, Any]:
        """What was trained on, as JSON: "sha256", "rows", "held_out_rows", "tokens" (of the inputs) and "sources"."""
        digest = hashlib.sha256()
        for examples in (self.train, self.held_out):
            for example in examples:
                digest.update(json.dumps(sorted(example.items())).encode())
            digest.update(b"\n")
        return {
            "sha256": digest.hexdigest(),
            "rows": len(self.train),
            "held_out_rows": len(self.held_out),
            "tokens": sum(len(example["input_ids"]) for example in self.train),
            "sources": self.sources,
        }


def load_recovery_data(
    source: str | Path | None,
    tokenizer: Any,
    task: Task,
    *,
    num_samples: int | None = None,
    sequence_length: int | None = None,
    vocab_size: int | None = None,
) -> RecoveryData:
    """Examples from a file or a folder of `datasets.save_to_disk`; every 16th row of each domain is held out.

    Args:
        source: For causal models whatever file `load_evaluation_data` takes: texts are joined and cut into full rows.
            For sequence-to-sequence models rows with the columns "input" and "target" (texts), for classifiers "text"
            and "label" (a number). None: the calibration text that ships, for a quick look.
        tokenizer: Needed for text.
        task: Of the model.
        num_samples: Most rows (of each domain); None: all.
        sequence_length: Most tokens in a row. None: 512 for text, token rows as they are.
        vocab_size: Token ids must be below it, if given.

    Raises:
        ValueError: What the loaders refuse, columns that are missing, text without a tokenizer, too few rows.
        TypeError: See `load_calibration`.
    """
    if source is None:
        logger.warning(
            "No data was given: the calibration text that ships with hf_mcsmoe is used. It is meant for a quick look. "
            "For a model to use, pass text of the domain that matters."
        )
        source = DEFAULT_TEXT
    if Path(source).is_dir():
        import datasets

        source = datasets.load_from_disk(str(source))
    if task != "causal":
        return _pairs(source, tokenizer, task, num_samples, sequence_length or DEFAULT_SEQUENCE_LENGTH)
    is_text = open_source(source).kind in ("text", "conversation")
    domains = load_evaluation_data(
        source,
        tokenizer,
        num_samples=num_samples,
        sequence_length=sequence_length or (DEFAULT_SEQUENCE_LENGTH if is_text else None),
        vocab_size=vocab_size,
    )
    train: list[Example] = []
    held_out: list[Example] = []
    for data in domains.values():
        pairs = [
            (ids, mask) for b in data.batches for ids, mask in zip(b.inputs["input_ids"], b.token_mask, strict=True)
        ]
        rows = [{"input_ids": ids[mask].tolist()} for ids, mask in pairs]
        _share_out(rows, train, held_out)
    return RecoveryData(train, held_out, [data.source for data in domains.values()])


def _share_out(rows: list[Example], train: list[Example], held_out: list[Example]) -> None:
    every = min(HELD_OUT_EVERY, max(2, len(rows)))
    for place, row in enumerate(rows):
        (held_out if place % every == every // 2 else train).append(row)


def _pairs(source: Any, tokenizer: Any, task: Task, num_samples: int | None, sequence_length: int) -> RecoveryData:
    if tokenizer is None:
        raise ValueError("The data is text, but there is no tokenizer. Save one in the folder of the model.")
    names = COLUMNS[task]
    opened = open_source(source, names[0])
    rows: list[Example] = []
    for number, record in enumerate(opened.items):
        if num_samples is not None and number >= num_samples:
            break
        missing = [name for name in names if name not in record]
        if missing:
            raise ValueError(
                f"Row {number} of the {opened.description} has no {missing[0]!r}, it has {sorted(record)}. "
                f"Rows for this kind of model have the columns {list(names)}."
            )
        text, label = (record[name] for name in names)
        ids = tokenizer(text, truncation=True, max_length=sequence_length)["input_ids"]
        if task == "seq2seq":
            label = tokenizer(text_target=label, truncation=True, max_length=sequence_length)["input_ids"]
        rows.append({"input_ids": ids, "labels": label})
    train: list[Example] = []
    held_out: list[Example] = []
    _share_out(rows, train, held_out)
    return RecoveryData(train, held_out, [opened.description])


class RowCollator:
    """Rows of `RecoveryData` -> a batch padded on the right.

    Args:
        pad_id: Token that fills rows up; masked, so that any will do.
        task: Whether labels are the inputs, rows of their own, or one number.
    """

    def __init__(self, pad_id: int, task: Task):
        self.pad_id = pad_id
        self.task = task

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (B, S) and `labels`, int64."""
        ids = [example["input_ids"] for example in examples]
        batch = {"input_ids": _padded(ids, self.pad_id), "attention_mask": _padded([[1] * len(row) for row in ids], 0)}
        if self.task == "causal":
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        elif self.task == "seq2seq":
            labels = _padded([example["labels"] for example in examples], IGNORED)
        else:
            labels = torch.tensor([example["labels"] for example in examples])
        return {**batch, "labels": labels}


def _padded(rows: Iterable[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
