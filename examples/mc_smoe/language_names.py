"""The task: which language is this name in?

Names of languages, countries, scripts, currencies, time zones and units in 25 languages of Latin script, close ones
among them (Danish, Norwegian and Swedish; Spanish, Portuguese, Galician and Catalan; Czech and Slovak; ...).
They are the Unicode CLDR data (Unicode licence v3, https://www.unicode.org/license.txt) that the package Babel
carries (`pip install Babel`); nothing is downloaded. Text to text: "Tyskland" -> "sv". A name that two of the
languages share is left out, so that there is one right answer.

An item, such as the country DE with all its 25 names, is in one split as a whole: a model cannot know the test's
"Alemanha" from the "Alemania" of its training.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from babel import Locale
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

LANGUAGES = tuple("da nb sv nl af de en fr es pt gl ca it ro cs sk pl sl hr fi et id ms tr az".split())
NAMES_BY_CODE = ("languages", "territories", "scripts", "currency_names")
LONGEST = 48  # bytes; one name in a hundred is longer and left out
BUCKETS = 20  # of 20 items, 3 are for the test, 1 for validation, 16 for training
SPLIT_OF_BUCKET = {0: "test", 1: "test", 2: "test", 3: "validation"}


@dataclass(frozen=True)
class NamedItem:
    """A name, the language it is in, and what it names."""

    text: str
    language: str
    item: str


def names_of(language: str) -> Iterator[NamedItem]:
    """All names that CLDR has in a language; the same name may come for several items."""
    data = Locale(language)._data
    for kind in NAMES_BY_CODE:
        for code, text in data[kind].items():
            yield NamedItem(text, language, f"{kind} {code}")
    for zone, entry in data["meta_zones"].items():
        yield NamedItem(entry.get("long", {}).get("standard", ""), language, f"zone {zone}")
    for unit, entry in data["unit_display_names"].items():
        yield NamedItem(entry.get("long", ""), language, f"unit {unit}")


def split_of(item: str) -> str:
    """Split of an item, by a hash of its code: the same everywhere and for ever."""
    bucket = int(hashlib.sha256(item.encode()).hexdigest(), 16) % BUCKETS
    return SPLIT_OF_BUCKET.get(bucket, "train")


def read_splits() -> dict[str, list[NamedItem]]:
    """Named items by split ("train", "validation", "test"), without ambiguous names and without doubles.

    A name that stands for items of several splits goes to the first of them in the order train, validation, test.
    """
    languages_of_text: dict[str, set[str]] = {}
    named = [entry for language in LANGUAGES for entry in names_of(language)]
    for entry in named:
        languages_of_text.setdefault(entry.text.casefold(), set()).add(entry.language)
    splits: dict[str, list[NamedItem]] = {"train": [], "validation": [], "test": []}
    seen = {""}
    for split, entries in splits.items():
        for entry in named:
            key = entry.text.casefold()
            is_new = key not in seen and split_of(entry.item) == split
            if is_new and len(languages_of_text[key]) == 1 and len(entry.text.encode()) <= LONGEST:
                seen.add(key)
                entries.append(entry)
    return splits


def train_tokenizer(entries: list[NamedItem], vocab_size: int) -> PreTrainedTokenizerFast:
    """Pieces of words (byte-level BPE) learned from the names of the training split; closes a text with </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((entry.text for entry in entries), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def encode(entries: list[NamedItem], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    """Rows {"input_ids", "labels"}: the name; the language code. Both end with </s>."""
    return [
        {"input_ids": tokenizer(entry.text)["input_ids"], "labels": tokenizer(entry.language)["input_ids"]}
        for entry in entries
    ]


class Collator:
    """Pads rows to (B, S) `input_ids` and `attention_mask`, (B, L) `labels` with -100."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        input_ids = pad([row["input_ids"] for row in rows], self.pad_token_id)
        labels = pad([row["labels"] for row in rows], -100)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(input_ids.shape[1])[None] < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of different lengths as one (B, longest) int64 tensor."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def majority_share(entries: list[NamedItem]) -> float:
    """Accuracy of always answering the most frequent language."""
    counts = Counter(entry.language for entry in entries)
    return max(counts.values()) / len(entries)
