"""Anything a user has -> a `Source` of texts, conversations, token rows or batches, none of them tokenised yet.

Only what the steps of `rows` and `loading` need is read: a stream is never read further than asked for, and a row
that is not part of the sample is never converted.
"""

import hashlib
import json
import numbers
import os
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, islice
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers.utils import logging

from ..registry import closest

logger = logging.get_logger(__name__)

# Columns looked for when `text_column` is not given, best first: who tokenised a dataset means those tokens,
# although `datasets.map` leaves the text beside them.
COLUMNS = ("input_ids", "text", "messages", "conversations")
FILE_ENDINGS = (".txt", ".jsonl", ".parquet", ".npy")
ROLE_OF_SPEAKER = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for the roles of a chat


@dataclass(frozen=True, eq=False)
class Source:
    """What the user gave, opened but not read."""

    kind: str  # of its items: "text", "conversation", "tokens" or "batch"
    items: Any  # an iterator (a stream), or something with a length that an index reads
    column: str | None  # where the items are records: the column that holds the value
    description: str

    @property
    def is_stream(self) -> bool:
        """True if the items can only be read from the start, and perhaps never end."""
        return isinstance(self.items, Iterator)

    def values(self, order: Iterable[int] | None = None) -> Iterator[tuple[int, Any]]:
        """Read pairs of index and value: a str, a conversation, (ids, mask or None) of one row, or a batch.

        Args:
            order: Which items, in which order; all from first to last by default. A stream ignores it.

        Raises:
            TypeError, ValueError: An item is of another type than the first, or lacks the column.
        """
        if self.is_stream:
            pairs = enumerate(self.items)
        else:
            pairs = ((index, self.items[index]) for index in (range(len(self.items)) if order is None else order))
        for index, item in pairs:
            kind, value = _value(item, index, self.column, self.kind)
            if kind != self.kind:
                raise TypeError(
                    f"Calibration item {index} is {_named(kind, value)}, but the first one is of kind {self.kind!r}. "
                    "Give items of one kind only."
                )
            yield index, value


def open_source(source: Any, text_column: str | None = None) -> Source:
    """Open whatever `load_calibration` accepts; see there for the kinds and the errors."""
    items, description = _open(source)
    if isinstance(items, Iterator):
        first = list(islice(items, 1))
        items = chain(first, items)
    else:
        first = [items[0]] if len(items) else []
    if not first:
        raise ValueError(f"The calibration source is empty ({description}). Give at least one text or row of tokens.")
    item = first[0]
    # What comes out of a loader must be a batch, even if "input_ids" is missing and it looks like a record.
    kind = "batch" if isinstance(source, (Mapping, DataLoader)) and isinstance(item, Mapping) else _kind(item)
    column = _column(item, text_column) if kind == "record" else None
    if text_column is not None and column is None:
        raise ValueError(f"text_column={text_column!r} was given, but the {description} has no columns. Leave it out.")
    kind, value = _value(item, 0, column, kind)
    if kind is None:
        raise TypeError(
            f"The first calibration item is {_named(kind, value)}; allowed are texts, lists of token ids, chats "
            "(lists of {'role', 'content'}), rows with such a column, and batches with 'input_ids'. "
            "Put a single row of token ids into a list: [ids]."
        )
    opened = Source(kind, items, column, description)
    if isinstance(items, (list, tuple)):
        for _ in opened.values():  # what is in memory is checked as a whole, not only the sample of it
            pass
    return opened


def _open(source: Any) -> tuple[Any, str]:
    """Items (indexable, or an iterator for a stream) and the description of what the user gave."""
    datasets = sys.modules.get("datasets")  # whoever passes an object of it has imported it
    if source is None:
        logger.warning(
            "No calibration data was given: the text that ships with hf_mcsmoe is used (technical English prose and "
            "Python code). It is meant for a quick look. For a model to use, pass calibration text of the domain "
            "that matters: which experts are kept depends on it."
        )
        return _read_jsonl("calibration.jsonl", _default_text()), "hf_mcsmoe default text"
    if isinstance(source, (str, os.PathLike)):
        return _open_file(os.fspath(source))
    if isinstance(source, Mapping):
        return [source], "single batch"
    if isinstance(source, (Tensor, np.ndarray)):
        return _token_matrix(
            source
        ), f"token {'tensor' if isinstance(source, Tensor) else 'array'} {tuple(source.shape)}"
    if datasets is not None and isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return _open_dataset(source)
    if isinstance(source, DataLoader):
        return iter(source), "DataLoader"
    if isinstance(source, (list, tuple)):
        return source, f"list of {_counted(source)}"
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        return source, f"{type(source).__name__} of {len(source)} rows"
    if isinstance(source, Iterable):
        return iter(source), f"stream ({type(source).__name__})"
    raise TypeError(
        f"calibration cannot be {type(source).__name__}; allowed are None, a file, a list of texts, token ids or "
        "chats, a dataset, a token tensor or array, a DataLoader and batches. Give texts as a list: [text]."
    )


def _default_text() -> bytes:
    return files("hf_mcsmoe").joinpath("assets", "calibration.jsonl").read_bytes()


def _open_file(path: str) -> tuple[Any, str]:
    name, ending = os.path.basename(path), os.path.splitext(path)[1].lower()
    if not os.path.isfile(path):
        raise ValueError(
            f"There is no calibration file {reprlib.repr(path)}. A string is taken for a path: give text as a list, "
            "[text], and a dataset of the Hub as an object, datasets.load_dataset(...)."
        )
    if ending not in FILE_ENDINGS:
        raise ValueError(
            f"Calibration file {name!r} has the ending {ending!r}, allowed are {', '.join(FILE_ENDINGS)}. "
            "Convert it, or read it yourself and pass a list of texts."
        )
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    description = f"file {name} (sha256 {digest.hexdigest()[:16]})"
    if ending == ".npy":
        return _token_matrix(_read_npy(path, name)), description
    if ending == ".parquet":
        return _read_parquet(path), description
    with open(path, "rb") as file:
        content = file.read()
    if ending == ".jsonl":
        return _read_jsonl(name, content), description
    text = content.decode("utf-8-sig")
    return [text] if text.strip() else [], description


def _read_npy(path: str, name: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{name} is not an array of token ids: {error} Write one with numpy.save.") from error


def _read_jsonl(name: str, content: bytes) -> list[Any]:
    rows = []
    # Split at "\n" only: str.splitlines would also cut inside a text at characters such as U+2028.
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {name} is not JSON: {error}. Write one object a line.") from error
    return rows


def _read_parquet(path: str) -> list[Any]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Reading .parquet calibration files needs pyarrow, which is not installed. "
            "Run `pip install hf-mcsmoe[data]`."
        ) from error
    return pyarrow.parquet.read_table(path).to_pylist()


def _open_dataset(dataset: Any) -> tuple[Any, str]:
    name = dataset.info.dataset_name or getattr(dataset, "_fingerprint", "without a name")
    description = f"dataset {name}" + (f", split {dataset.split}" if dataset.split else "")
    datasets = sys.modules["datasets"]
    if isinstance(dataset, datasets.IterableDataset):
        return iter(dataset), f"{description} (streamed)"
    return dataset, f"{description} ({len(dataset)} rows)"


def _token_matrix(tokens: Any) -> Any:
    if tokens.ndim != 2:
        raise ValueError(
            f"Calibration tokens must have the shape (rows, tokens), got {tuple(tokens.shape)}. "
            "Cut a stream of tokens into rows: tokens[: rows * 512].reshape(rows, 512)."
        )
    return tokens


def _kind(item: Any) -> str | None:
    if isinstance(item, str):
        return "text"
    if isinstance(item, Mapping):
        return "batch" if "input_ids" in item and _depth(item["input_ids"]) > 1 else "record"
    if isinstance(item, (Tensor, np.ndarray)):
        return {1: "tokens", 2: "batch"}.get(item.ndim)
    if isinstance(item, (list, tuple)):
        if item and isinstance(item[0], Mapping):
            return "conversation"
        return "tokens" if not item or isinstance(item[0], (numbers.Number, np.generic)) else None
    return None


def _depth(ids: Any) -> int:
    if isinstance(ids, (Tensor, np.ndarray)):
        return ids.ndim
    return 1 + (isinstance(ids, (list, tuple)) and len(ids) > 0 and not isinstance(ids[0], numbers.Number))


def _column(record: Mapping, text_column: str | None) -> str:
    names = list(record)
    if text_column is not None:
        if text_column not in names:
            raise ValueError(
                f"There is no column {text_column!r} for text_column; the columns are {names}."
                f"{closest(text_column, names)}"
            )
        return text_column
    found = [name for name in COLUMNS if name in names]
    if not found:
        raise ValueError(
            f"The calibration rows have the columns {names}, but none of {list(COLUMNS)}. "
            "Name the one with the text by text_column; a single chat goes into a list: [chat]."
        )
    return found[0]


def _value(item: Any, index: int, column: str | None, expected: str | None) -> tuple[str | None, Any]:
    """The kind and the value of one item; records are replaced by what their column holds."""
    kind, value, mask = _kind(item), item, None
    if kind == "record" and column is not None:
        if column not in item:
            raise ValueError(
                f"Calibration row {index} has no column {column!r}, it has {list(item)}. Remove or complete that row."
            )
        value = item[column]
        kind = _kind(value) if not isinstance(value, Mapping) else None
        mask = item.get("attention_mask") if column == "input_ids" else None
    if kind == "record" and expected == "batch":
        kind = "batch"  # whether "input_ids" is there is checked with the rest of the batch
    if kind == "tokens":
        value = (value, mask)
    elif kind == "conversation":
        value = _chat(value, index)
    return kind, value


def _chat(messages: Any, index: int) -> list[dict]:
    """The messages with "role" and "content", from those or from ShareGPT's "from" and "value"."""
    chat = []
    for message in messages:
        if "role" not in message and "from" in message and "value" in message:
            role = ROLE_OF_SPEAKER.get(message["from"], message["from"])
            message = {"role": role, "content": message["value"]}
        if "role" not in message:
            raise ValueError(
                f"Chat {index} has a message without 'role', its keys are {list(message)}. "
                "Write messages as {'role': 'user', 'content': '...'}."
            )
        chat.append(dict(message))
    return chat


def _named(kind: str | None, value: Any) -> str:
    return f"of type {type(value).__name__}" if kind is None else f"of kind {kind!r}"


def _counted(source: list | tuple) -> str:
    kind = _kind(source[0]) if len(source) else "record"
    noun = {"text": "text", "conversation": "chat", "tokens": "token row", "batch": "batch"}.get(kind, "row")
    plural = "" if len(source) == 1 else "es" if noun == "batch" else "s"
    return f"{len(source)} {noun}{plural}"
