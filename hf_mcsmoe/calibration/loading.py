"""Anything a user has -> calibration batches with masks, and a fingerprint. B rows, S tokens of the longest."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rows import model_inputs, pad_rows, permutation, text_rows, token_row
from .sources import Source, open_source

DEFAULT_NUM_SAMPLES = 256
DEFAULT_SEQUENCE_LENGTH = 512


@dataclass(frozen=True, eq=False)
class CalibrationBatch:
    """Rows that go through the model together.

    Raises:
        ValueError: `token_mask` is not a bool tensor of the shape of `input_ids`.
    """

    inputs: dict[str, Tensor]  # keyword arguments of the model: input_ids, attention_mask (B, S) int64, ...; no labels
    token_mask: Tensor  # (B, S) bool: True for real tokens, False for padding
    held_out: bool  # True: only used to measure errors, never in statistics

    def __post_init__(self) -> None:
        shape = tuple(self.inputs["input_ids"].shape)
        if self.token_mask.dtype != torch.bool or tuple(self.token_mask.shape) != shape:
            raise ValueError(
                f"token_mask must be a bool tensor of shape {shape} like input_ids, got {self.token_mask.dtype} "
                f"{tuple(self.token_mask.shape)}. Use attention_mask.bool()."
            )


@dataclass(frozen=True, eq=False)
class Calibration:
    """All calibration batches: those for the statistics first, then the held-out ones.

    Raises:
        ValueError: No batch for the statistics has a real token.
    """

    batches: tuple[CalibrationBatch, ...]
    source: str  # what the user gave, in words

    def __post_init__(self) -> None:
        if self.num_tokens == 0:
            raise ValueError(
                f"The calibration data ({self.source}) has no real token: all of it is empty text or padding. "
                "Check the texts and the attention mask (1 for real tokens)."
            )

    @property
    def num_tokens(self) -> int:
        """Real tokens that are not held out."""
        return sum(int(batch.token_mask.sum()) for batch in self.batches if not batch.held_out)

    @property
    def num_held_out_tokens(self) -> int:
        """Real tokens that are held out."""
        return sum(int(batch.token_mask.sum()) for batch in self.batches if batch.held_out)

    @property
    def num_rows(self) -> int:
        """Rows of all batches, held-out ones included."""
        return sum(batch.token_mask.shape[0] for batch in self.batches)

    def fingerprint(self) -> dict[str, Any]:
        """What was calibrated on, as JSON: "sha256", "tokens", "held_out_tokens", "rows" and "source".

        The hash covers the token ids, the masks, which rows are held out, and tensors beside the tokens such as
        pixel_values. Padding before and after a row does not count, so that `batch_size` does not matter.
        """
        digest = hashlib.sha256()
        for batch in self.batches:
            _hash_batch(digest, batch)
        return {
            "sha256": digest.hexdigest(),
            "tokens": self.num_tokens,
            "held_out_tokens": self.num_held_out_tokens,
            "rows": self.num_rows,
            "source": self.source,
        }


def load_calibration(
    source: Any,
    tokenizer: Any = None,
    *,
    num_samples: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    packing: bool = True,
    held_out_fraction: float = 1 / 16,
    seed: int = 0,
    vocab_size: int | None = None,
    text_column: str | None = None,
) -> Calibration:
    """Batches with masks from whatever a user has. Everything is read and checked here, before any model runs.

    Sampling: what has a length is sampled at random under `seed` (texts until there are enough tokens, everything
    else by row) and keeps its order. A stream (generator, DataLoader, streamed dataset) is read from its start and
    not much further than needed: shuffle it before. An endless loader needs `num_samples`.

    Text: special tokens are those that the tokenizer adds by itself. Where there is clearly more text than wanted,
    texts longer than about one row are cut at line ends and each first gives one passage, chosen at random: a small
    sample then covers many documents, and all of a book or a dump in one file.

    Args:
        source: One of
            - None: the text that ships with hf_mcsmoe, for a quick look (a warning says so);
            - a path: .txt (one document; blank lines are text), .jsonl or .parquet (rows as below), .npy (R, S);
            - a list or iterable of texts, of chats (lists of {"role", "content"}), of rows of token ids, or of dicts
              with a column "input_ids", "text", "messages" or "conversations" (the first of these that exists);
            - a `datasets.Dataset` or `IterableDataset` with such a column;
            - token ids as integer tensor or array (R, S);
            - a dict batch, a DataLoader or an iterable of them: (B, S) "input_ids" and "attention_mask", padded left
              or right. Other tensors are kept, "labels" and what is no tensor dropped;
            - a `Calibration`, which is returned as it is.
        tokenizer: Needed for text and chats.
        num_samples: Most rows to use. None: 256 for text, all of everything else.
        sequence_length: Most tokens in a row. None: 512 for text, rows as they are for everything else. Longer rows
            lose their end (left-padded batches: their beginning).
        batch_size: Most rows in a batch. Batches given by the user are split to it, never joined.
        packing: True joins texts with the end-of-sequence token and cuts them into full rows. False makes a row of
            the beginning of each text.
        held_out_fraction: Share of the rows used only to measure errors: every k-th row, k = round(1 / fraction), but
            at most every second and at least one. One row alone is not held out.
        seed: Of the random sample.
        vocab_size: Token ids must be below it, if given.
        text_column: Column of a dataset, file or list of dicts that holds the text, chat or token ids.

    Returns:
        Batches in the order of the source, held-out ones after the others. A batch whose tensors beside the tokens
        are not one entry a row (e.g. the patches of several images) counts as one row and is never split.

    Raises:
        ValueError: Empty source, nothing but padding, ids outside the vocabulary, text without tokenizer or chat
            template, missing or unknown file, column or "input_ids", masks other than (B, S) of 0 and 1, numbers out
            of range.
        TypeError: A source, row or token type that is not listed above, or rows of several kinds.
    """
    for name, value in (
        ("num_samples", num_samples),
        ("sequence_length", sequence_length),
        ("batch_size", batch_size),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}. Leave it out for the default.")
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must be in [0, 1), got {held_out_fraction!r}. Use 0 to hold nothing out.")
    if isinstance(source, Calibration):
        _check_vocabulary(source, vocab_size)
        return source
    opened = open_source(source, text_column)
    pad_id = getattr(tokenizer, "pad_token_id", None) or 0
    pad_id = pad_id if vocab_size is None or pad_id < vocab_size else 0  # an added pad token may have no embedding
    if opened.kind == "batch":
        given = _given_batches(opened, num_samples, sequence_length, pad_id)
        batches = _split(
            given, _sample(opened, sum(map(_units, given)), num_samples, seed), held_out_fraction, batch_size
        )
    else:
        if opened.kind == "tokens":
            rows = _token_rows(opened, num_samples, sequence_length, seed)
        else:
            size = (num_samples or DEFAULT_NUM_SAMPLES, sequence_length or DEFAULT_SEQUENCE_LENGTH)
            rows = [(ids, torch.ones_like(ids)) for ids in text_rows(opened, tokenizer, *size, packing, seed)]
        batches = _padded(rows, pad_id, held_out_fraction, batch_size)
    calibration = Calibration(tuple(batches), opened.description)
    _check_vocabulary(calibration, vocab_size)
    return calibration


def _sample(source: Source, length: int, num_samples: int | None, seed: int) -> list[int]:
    """The places below `length` that are used, in order: a seeded sample, or the first ones of a stream."""
    if num_samples is None or num_samples >= length:
        return list(range(length))
    return list(range(num_samples)) if source.is_stream else sorted(permutation(length, seed)[:num_samples])


def _token_rows(
    source: Source, num_samples: int | None, sequence_length: int | None, seed: int
) -> list[tuple[Tensor, Tensor]]:
    order = None if source.is_stream else _sample(source, len(source.items), num_samples, seed)
    values = islice(source.values(order), num_samples)
    rows = [token_row(ids, mask, index, sequence_length) for index, (ids, mask) in values]
    return [row for row in rows if row[0].numel() > 0]


def _given_batches(
    source: Source, num_samples: int | None, sequence_length: int | None, pad_id: int
) -> list[dict[str, Tensor]]:
    given, num_rows = [], 0
    for index, batch in source.values():
        given.append(model_inputs(batch, index, sequence_length, pad_id))
        num_rows += _units(given[-1])
        if source.is_stream and num_samples is not None and num_rows >= num_samples:
            break
    return given


def _is_per_row(inputs: dict[str, Tensor]) -> bool:
    num_rows = inputs["input_ids"].shape[0]
    return all(tensor.shape[:1] == (num_rows,) for tensor in inputs.values())


def _units(inputs: dict[str, Tensor]) -> int:
    """Rows that can be taken from a batch one by one; 1 if some tensor is not one entry a row."""
    return inputs["input_ids"].shape[0] if _is_per_row(inputs) else 1


def _held_out_rows(num_rows: int, fraction: float) -> set[int]:
    if fraction == 0 or num_rows < 2:
        return set()
    step = max(2, round(1 / fraction))
    return set(range(min(step // 2, num_rows - 1), num_rows, step))


def _padded(
    rows: list[tuple[Tensor, Tensor]], pad_id: int, held_out_fraction: float, batch_size: int
) -> Iterator[CalibrationBatch]:
    held_out_rows = _held_out_rows(len(rows), held_out_fraction)
    for held_out in (False, True):
        chosen = [row for place, row in enumerate(rows) if (place in held_out_rows) == held_out]
        for start in range(0, len(chosen), batch_size):
            inputs = pad_rows(chosen[start : start + batch_size], pad_id)
            yield CalibrationBatch(inputs, inputs["attention_mask"].bool(), held_out)


def _split(
    given: list[dict[str, Tensor]], sample: list[int], held_out_fraction: float, batch_size: int
) -> Iterator[CalibrationBatch]:
    """The sampled rows of the user's batches; a batch that cannot be split counts as one row."""
    held_out_places = _held_out_rows(len(sample), held_out_fraction)
    is_held_out = {row: place in held_out_places for place, row in enumerate(sample)}
    for held_out in (False, True):
        first = 0
        for inputs in given:
            units = _units(inputs)
            rows = [row for row in range(units) if is_held_out.get(first + row) == held_out]
            first += units
            for part in torch.tensor(rows, dtype=torch.int64).split(batch_size) if rows else ():
                taken = inputs
                if units > 1:
                    taken = {name: tensor[part.to(tensor.device)] for name, tensor in inputs.items()}
                yield CalibrationBatch(taken, taken["attention_mask"].bool(), held_out)


def _check_vocabulary(calibration: Calibration, vocab_size: int | None) -> None:
    """Refuse ids the embedding does not have, padding included: the model looks that up as well."""
    for batch in calibration.batches:
        for name in ("input_ids", "decoder_input_ids"):
            ids = batch.inputs.get(name)
            if ids is None or ids.numel() == 0:
                continue
            if ids.min() < 0:
                raise ValueError(
                    f"{name} has the negative token id {int(ids.min())}. "
                    "If it marks padding, put the id of a real token there and 0 in the attention mask."
                )
            if vocab_size is not None and ids.max() >= vocab_size:
                raise ValueError(
                    f"{name} has the token id {int(ids.max())}, but the model's vocabulary has {vocab_size} tokens "
                    f"(ids 0 to {vocab_size - 1}). Is it the wrong tokenizer? Use the one of this model."
                )


def _hash_batch(digest: Any, batch: CalibrationBatch) -> None:
    ids, mask = batch.inputs["input_ids"].cpu(), batch.token_mask.cpu()
    others = {name: t for name, t in sorted(batch.inputs.items()) if name not in ("input_ids", "attention_mask")}
    is_per_row = _is_per_row(batch.inputs)
    for row_ids, row_mask, row in zip(ids, mask, range(len(ids)), strict=True):
        real = row_mask.nonzero().flatten().tolist() or [0, -1]
        row_ids, row_mask = row_ids[real[0] : real[-1] + 1], row_mask[real[0] : real[-1] + 1]
        digest.update(np.array([batch.held_out, len(row_ids)], dtype="<i8").tobytes())
        digest.update((row_ids * row_mask).numpy().astype("<i8").tobytes())
        digest.update(row_mask.numpy().tobytes())
        for name, tensor in others.items() if is_per_row else ():
            _hash_tensor(digest, name, tensor[row])
    for name, tensor in () if is_per_row else others.items():
        _hash_tensor(digest, name, tensor)


def _hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
