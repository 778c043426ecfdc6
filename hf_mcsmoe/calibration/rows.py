"""What a `Source` yields -> rows of token ids and model inputs. B rows, S tokens of the longest."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .sources import Source

# Tokenizers need about one token for so many characters of English; only decides whether long texts are cut.
CHARACTERS_PER_TOKEN = 4
NOT_INPUTS = ("labels", "label", "label_ids", "input_ids", "attention_mask")  # dropped, or handled by name


def permutation(length: int, seed: int) -> list[int]:
    """The numbers below `length` in an order that depends on `seed` alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


def text_rows(
    source: Source, tokenizer: Any, num_samples: int, sequence_length: int, packing: bool, seed: int
) -> list[Tensor]:
    """Tokenise texts or chats until there are `num_samples` rows, see `load_calibration`.

    Returns:
        Rows of (at most `sequence_length`,) int64 in the order of the source. Rows of one token are left out: they
        have no next token to predict.

    Raises:
        ValueError: There is no tokenizer, or no chat template for chats.
    """
    _check_tokenizer(source, tokenizer)
    wanted, count = num_samples * sequence_length, 0
    separator = tokenizer.eos_token_id if packing else None
    shortest = min(2, sequence_length)
    documents: dict[tuple[int, int], list[int]] = {}
    with logging.tqdm(total=wanted, desc="Tokenizing calibration text", unit=" tokens", delay=2) as progress:
        for place, text in _texts(source, tokenizer, wanted, sequence_length, packing, seed):
            # A chat template writes the special tokens itself.
            ids = tokenizer(text, add_special_tokens=source.kind == "text", verbose=False)["input_ids"]
            ids = ids[: wanted - count if packing else sequence_length]
            if not ids or (not packing and len(ids) < shortest):
                continue
            documents[place] = ids
            cost = len(ids) + (separator is not None and ids[-1] != separator) if packing else sequence_length
            count += cost
            progress.update(cost)
            if count >= wanted:
                break
    ordered = [documents[place] for place in sorted(documents)]
    rows = _pack(ordered, separator, sequence_length)[:num_samples] if packing else ordered
    return [torch.tensor(row, dtype=torch.int64) for row in rows if len(row) >= shortest]


def _check_tokenizer(source: Source, tokenizer: Any) -> None:
    if tokenizer is None:
        raise ValueError(
            f"The calibration source ({source.description}) is text, but there is no tokenizer. "
            "Pass tokenizer=AutoTokenizer.from_pretrained(...) of the model."
        )
    if source.kind == "conversation" and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"The calibration source ({source.description}) holds chats, but the tokenizer has no chat template. "
            "Set tokenizer.chat_template, or give the chats as texts."
        )


def _texts(
    source: Source, tokenizer: Any, wanted: int, sequence_length: int, packing: bool, seed: int
) -> Iterator[tuple[tuple[int, int], str]]:
    """Texts and their place (item, passage) in the source, in seeded random order; a stream in its own.

    If there is more text than wanted, long texts would fill the sample: each then gives one passage of about one row,
    and the other passages follow only when all texts were used.
    """
    order = None if source.is_stream else permutation(len(source.items), seed)
    texts = (
        (index, value if source.kind == "text" else tokenizer.apply_chat_template(value, tokenize=False))
        for index, value in source.values(order)
    )
    texts = ((index, text) for index, text in texts if text.strip())
    read: list[tuple[int, str]] = []
    if packing and source.kind == "text":
        num_characters = 0
        for index, text in texts:
            read.append((index, text))
            num_characters += len(text)
            if num_characters > CHARACTERS_PER_TOKEN * wanted:
                yield from _one_passage_each(chain(read, texts), CHARACTERS_PER_TOKEN * sequence_length, seed)
                return
    for index, text in chain(read, texts):
        yield (index, 0), text


def _one_passage_each(texts: Iterable[tuple[int, str]], size: int, seed: int) -> Iterator[tuple[tuple[int, int], str]]:
    generator = torch.Generator().manual_seed(seed)
    others = []
    for index, text in texts:
        passages = [((index, place), passage) for place, passage in enumerate(_passages(text, size))]
        yield passages.pop(int(torch.randint(len(passages), (), generator=generator)))
        others += passages
    for place in permutation(len(others), seed):
        yield others[place]


def _passages(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of at most `size` characters, at the last line end of each piece if it has one."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _pack(documents: list[list[int]], separator: int | None, sequence_length: int) -> list[list[int]]:
    """Join documents, with `separator` after those that do not end with it, and cut into rows."""
    joined: list[int] = []
    for ids in documents:
        if joined and separator is not None and joined[-1] != separator:
            joined.append(separator)
        joined.extend(ids)
    return [joined[start : start + sequence_length] for start in range(0, len(joined), sequence_length)]


def token_row(ids: Any, mask: Any, index: int, sequence_length: int | None = None) -> tuple[Tensor, Tensor]:
    """One row of a source of token rows, without the padding before and after it.

    Returns:
        Token ids and attention mask, both (S,) int64 on the CPU; S is 0 for nothing but padding.

    Raises:
        TypeError: The ids are not integers.
        ValueError: The ids are nested, or the mask is not one of 0 and 1 for each.
    """
    ids = _integers(ids, f"Token ids of calibration row {index}").cpu()
    if ids.ndim != 1:
        raise ValueError(
            f"Calibration row {index} has token ids of shape {tuple(ids.shape)}, a row must be flat. "
            "Give one list of ids for each row."
        )
    mask = _checked_mask(mask, ids, f"calibration row {index}")
    real = mask.nonzero().flatten()
    if real.numel() == 0:
        return ids[:0], mask[:0]
    first, last = int(real[0]), int(real[-1]) + 1
    if sequence_length is not None:
        last = min(last, first + sequence_length)
    return ids[first:last], mask[first:last]


def pad_rows(rows: list[tuple[Tensor, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, (B, S) int64, of rows padded on the right with `pad_id` and 0."""
    ids, masks = zip(*rows, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(list(ids), batch_first=True, padding_value=pad_id),
        "attention_mask": pad(list(masks), batch_first=True, padding_value=0),
    }


def model_inputs(batch: Any, index: int, sequence_length: int | None, pad_id: int) -> dict[str, Tensor]:
    """The keyword arguments of the model in one batch of the user.

    Args:
        batch: A mapping with "input_ids", or these ids alone. Without an attention mask every token is real.
        index: Which batch it is, for messages.
        sequence_length: Columns to keep, also of other (B, S, ...) tensors: the first, or of left-padded rows the
            last.
        pad_id: For `input_ids` given as lists of several lengths.

    Returns:
        `input_ids`, `attention_mask` (B, S) int64 and the other tensors as they are, without labels.

    Raises:
        ValueError: No "input_ids", ids that are not (B, S), a mask that is not (B, S) of 0 and 1.
        TypeError: The ids are not integers.
    """
    if not isinstance(batch, Mapping):
        batch = {"input_ids": batch}
    if "input_ids" not in batch:
        raise ValueError(
            f"Calibration batch {index} has no 'input_ids', its keys are {list(batch)}. "
            "Tokenise the text before batching; of a DatasetDict give one split."
        )
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if isinstance(ids, (list, tuple)):  # a tokenizer's output without return_tensors
        is_row = not ids or isinstance(ids[0], Number)
        ids, mask = ([ids], [mask]) if is_row else (ids, [None] * len(ids) if mask is None else mask)
        padded = pad_rows([token_row(*row, index) for row in zip(ids, mask, strict=True)], pad_id)
        ids, mask = padded["input_ids"], padded["attention_mask"]
    ids = _integers(ids, f"input_ids of calibration batch {index}")
    if ids.ndim != 2:
        raise ValueError(
            f"input_ids of calibration batch {index} must be (rows, tokens), got shape {tuple(ids.shape)}. "
            "Add the dimension of the rows: input_ids[None]."
        )
    inputs = {"input_ids": ids, "attention_mask": _checked_mask(mask, ids, f"calibration batch {index}")}
    for name, value in batch.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(value)
        if isinstance(value, Tensor) and name not in NOT_INPUTS:
            inputs[name] = value
    return inputs if sequence_length is None else _shortened(inputs, sequence_length)


def _shortened(inputs: dict[str, Tensor], sequence_length: int) -> dict[str, Tensor]:
    mask = inputs["attention_mask"]
    is_left_padded = bool((mask[:, :1] == 0).any()) and bool((mask[:, -1:] == 1).all())
    columns = slice(-sequence_length, None) if is_left_padded else slice(sequence_length)
    return {name: t[:, columns] if t.shape[:2] == mask.shape else t for name, t in inputs.items()}


def _integers(value: Any, what: str) -> Tensor:
    tensor = value
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.size and array.dtype.kind not in "iu":
            raise TypeError(f"{what} must be integers, got {array.dtype}. Pass token ids, not texts or embeddings.")
        tensor = torch.from_numpy(array.astype(np.int64))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{what} must be integers, got {tensor.dtype}. Pass token ids, not embeddings or logits.")
    return tensor.to(torch.int64)


def _checked_mask(mask: Any, ids: Tensor, where: str) -> Tensor:
    if mask is None:
        return torch.ones_like(ids)
    mask = torch.as_tensor(mask, device=ids.device)
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask of {where} has shape {tuple(mask.shape)}, but input_ids {tuple(ids.shape)}; "
            "4-D masks cannot be read. Give one mask entry for each token."
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"attention_mask of {where} has values besides 0 and 1. Use 1 for real tokens and 0 for padding; "
            "additive masks and segment numbers cannot be read."
        )
    return mask.to(torch.int64)
