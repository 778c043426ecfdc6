"""A file of a teacher's top-k logits, read by the content of each example. E examples, n target tokens of one."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .targets import TASKS, Task, targets_of
from .token_losses import IGNORED

FORMAT = "hf_mcsmoe.cached_teacher"
FORMAT_VERSION = 2  # 2: with the log-probabilities of the targets
KEY_BYTES = 16
INDEX, LOG_PROB = "teacher_index", "teacher_log_prob"  # what a batch with the teacher's distribution has more
TARGET_LOG_PROB = "target_log_prob"  # a tensor of the file
# What a text batch may hold. Pictures and sound change the logits, but are not in the key of an example.
TEXT_INPUTS = frozenset(
    {
        "attention_mask",
        "decoder_attention_mask",
        "decoder_input_ids",
        "input_ids",
        "labels",
        "token_type_ids",
    }
)


@dataclass(frozen=True)
class CacheDescription:
    """What is in a file of cached logits; its metadata."""

    task: Task
    teacher: str  # name of the model
    temperature: float
    top_k: int
    vocab_size: int
    num_examples: int
    num_tokens: int
    data_sha256: str  # of the keys of all examples in their order

    def to_metadata(self) -> dict[str, str]:
        """As safetensors holds it: every value in JSON."""
        values = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return {name: json.dumps(value) for name, value in values.items()}


class CachedTeacher:
    """The logits of a teacher that were computed once by `cache_teacher`; memory-mapped, in any order of examples.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or of a newer format than this version of the package reads.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.description = read_description(self.path)
        self._file: Any = None
        keys = self._open().get_tensor("keys").numpy()
        self._order = np.lexsort((keys[:, 1], keys[:, 0]))
        self._keys = keys[self._order]
        self.has_target_log_prob = TARGET_LOG_PROB in self._open().keys()

    def __getstate__(self) -> dict[str, Any]:
        # The processes of a data loader open the file for themselves.
        return {**self.__dict__, "_file": None}

    def _open(self) -> Any:
        if self._file is None:
            self._file = safe_open(self.path, framework="pt")
        return self._file

    def add_to(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the teacher's distribution at each target.

        Returns:
            The batch and `teacher_index` (B, S, k) int32 and `teacher_log_prob` (B, S, k + 1) float32 in the order of
            `targets_of` (no dimension S for classification); 0 where there is no target.

        Raises:
            ValueError: An example that the file does not have, or inputs besides text.
        """
        targets = targets_of(batch, self.description.task)
        top_k = self.description.top_k
        index = torch.zeros(*targets.shape, top_k, dtype=torch.int32)
        log_prob = torch.zeros(*targets.shape, top_k + 1)
        self._fill(batch, targets, {"index": index, "log_prob": log_prob})
        return {**batch, INDEX: index, LOG_PROB: log_prob}

    def target_log_prob(self, batch: dict[str, Any]) -> Tensor:
        """Log softmax(z) of each target, at temperature 1 whatever that of the file is.

        Returns:
            (B, S) float32 in the order of `targets_of` ((B,) for classification); 0 where there is no target.

        Raises:
            ValueError: As for `add_to`. Only a file with `has_target_log_prob` has them.
        """
        targets = targets_of(batch, self.description.task)
        found = torch.zeros(targets.shape)
        self._fill(batch, targets, {TARGET_LOG_PROB: found})
        return found

    def holds(self, key: bytes) -> bool:
        """Whether the file has the example with a key of `example_keys`."""
        return self._find(key) is not None

    def _fill(self, batch: dict[str, Any], targets: Tensor, tensors: dict[str, Tensor]) -> None:
        """Write what the file has for each target of a batch into tensors, by their names in the file."""
        file = self._open()
        for row, key in enumerate(example_keys(batch, self.description.task)):
            place = self._place_of(key)
            start, end = file.get_slice("offsets")[place : place + 2].tolist()
            is_target = targets[row] != IGNORED
            for name, tensor in tensors.items():
                tensor[row][is_target] = _rows(file, name, start, end, targets.dim())

    def _place_of(self, key: bytes) -> int:
        place = self._find(key)
        if place is None:
            raise ValueError(
                f"An example is not among the {self.description.num_examples} in {str(self.path)!r}: other data, "
                "another tokenizer, row length or collator. Make the file again with exactly the examples, evaluation "
                "data included, that you train with."
            )
        return place

    def _find(self, key: bytes) -> int | None:
        high, low = np.frombuffer(key, dtype="<i8")
        first, last = (np.searchsorted(self._keys[:, 0], high, side) for side in ("left", "right"))
        place = first + np.searchsorted(self._keys[first:last, 1], low)
        if place >= last or self._keys[place, 1] != low:
            return None
        return int(self._order[place])


def _rows(file: Any, name: str, start: int, end: int, dim: int) -> Tensor:
    rows = file.get_slice(name)[start:end]
    return rows if dim == 2 else rows[0]


def read_description(path: Path) -> CacheDescription:
    """What a file of cached logits says about itself; see `CachedTeacher` for the errors."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of cached logits {str(path)!r}. Make it with cache_teacher.")
    try:
        with safe_open(path, framework="pt") as file:
            values = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{str(path)!r} is no file of cached logits: {error}. Make it again with cache_teacher."
        ) from error
    if values.pop("format", None) != FORMAT:
        raise ValueError(
            f"{str(path)!r} holds no cached logits. Give a file that cache_teacher made, or the folder of a model."
        )
    version = values.pop("format_version")
    if version > FORMAT_VERSION or values["task"] not in TASKS:
        raise ValueError(
            f"{str(path)!r} has format_version {version}, this hf_mcsmoe reads up to {FORMAT_VERSION}. "
            "Upgrade it: pip install --upgrade hf-mcsmoe"
        )
    return CacheDescription(**values)


def example_keys(batch: Mapping[str, Any], task: Task) -> Iterator[bytes]:
    """A key of 16 bytes for each row of a batch, from its token ids and labels; padding does not count.

    Raises:
        ValueError: Inputs besides text, or no labels.
    """
    others = sorted(set(batch) - TEXT_INPUTS)
    if others:
        raise ValueError(
            f"Cached logits belong to token ids alone, but the batch has {others} as well. Distil from a live teacher."
        )
    ids, targets = batch["input_ids"], targets_of(batch, task)
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    for row_ids, row_mask, row_targets in zip(ids, mask, targets.reshape(len(ids), -1), strict=True):
        is_real = row_mask != 0
        # Targets of a causal model lie at its input tokens, those of a decoder are padded on their own.
        row_targets = row_targets[is_real] if task == "causal" else _trimmed(row_targets)
        digest = hashlib.blake2b(task.encode(), digest_size=KEY_BYTES)
        for values in (row_ids[is_real], row_targets):
            digest.update(np.array([len(values), *values.tolist()], dtype="<i8").tobytes())
        yield digest.digest()


def _trimmed(targets: Tensor) -> Tensor:
    real = (targets != IGNORED).nonzero().flatten().tolist() or [0, -1]
    return targets[real[0] : real[-1] + 1]
