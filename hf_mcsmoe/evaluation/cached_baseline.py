"""A baseline that does not fit beside the model: its top-k logits and its continuations, computed before.

The file is that of `cache_teacher`, at temperature 1 and with the rows of the evaluation as its examples.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..calibration import Calibration, CalibrationBatch
from ..training.cache_writer import cache_teacher
from ..training.cached_teacher import INDEX, LOG_PROB, CachedTeacher, example_keys
from ..training.targets import without_padding
from ..training.token_losses import IGNORED, TopKDistribution, token_losses

TOP_K = 128  # logits of each token that are kept, 1 kB a token
TEMPERATURE = 1.0
FILLERS = {"labels": IGNORED}  # of rows that are shorter; 0 for all other inputs


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """What a baseline predicts at some tokens."""

    index: Tensor  # (n, k) int32: the likeliest tokens, the likeliest first
    log_prob: Tensor  # (n, k + 1) float32: theirs, and that of all others together
    target_log_prob: Tensor  # (n,) float32: that of the token which comes

    def scores(self, part: Tensor, target: Tensor, logits: Tensor) -> Tensor:
        """Loss of each token, the baseline's, KL(baseline || model) and whether the top tokens agree.

        The KL is that of k + 1 outcomes: the baseline's likeliest tokens, and all others as one.

        Args:
            part: Which tokens, (m,) int64.
            target: What comes after them, (m,) int64 on the device of `logits`.
            logits: The model's, (m, V).

        Returns:
            (4, m) float32.
        """
        device = logits.device
        index, log_prob = self.index[part].to(device), self.log_prob[part].to(device)
        loss, kl = token_losses(logits, target, TopKDistribution(index, log_prob))
        agrees = logits.argmax(-1) == index[:, 0]
        return torch.stack([loss, -self.target_log_prob[part].to(device), kl, agrees.to(loss)]).float()


class BaselineCache:
    """Cached logits of a baseline that were checked against the rows they are for.

    Args:
        path: A file of `write_baseline_cache`.
        data_by_domain: The rows of the evaluation.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, was made at another temperature or by an older version of this package, or
            does not hold all rows.
    """

    def __init__(self, path: str | Path, data_by_domain: Mapping[str, Calibration]):
        self._cached = CachedTeacher(path)
        found = self._cached.description
        name = repr(str(path))
        if found.task != "causal" or found.temperature != TEMPERATURE or not self._cached.has_target_log_prob:
            raise ValueError(
                f"{name} holds logits for task {found.task!r} at temperature {found.temperature}; an evaluation needs "
                f"'causal' at {TEMPERATURE} with the probabilities of the targets. Make it with --baseline MODEL "
                f"--baseline-cache and a file that does not exist."
            )
        rows = [key for data in data_by_domain.values() for batch in data.batches for key in _keys(batch)]
        missing = sum(not self._cached.holds(key) for key in rows)
        if missing:
            raise ValueError(
                f"{name} was made for other data: {missing} of {len(rows)} rows of this evaluation are not among its "
                f"{found.num_examples}. Evaluate on the same text, number of rows and row length, with the same "
                "tokenizer, or make another file for this data with --baseline MODEL."
            )

    @property
    def name(self) -> str:
        """Name of the model it is of."""
        return self._cached.description.teacher

    @property
    def top_k(self) -> int | None:
        """k, or None where that is the whole vocabulary."""
        found = self._cached.description
        return None if found.top_k == found.vocab_size else found.top_k

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._cached.description.vocab_size

    def tokens(self, batch: CalibrationBatch, row: Tensor, position: Tensor) -> CachedTokens:
        """What the baseline predicts at some tokens (n,) of a batch, after each of them."""
        examples = _examples(batch)
        found = self._cached.add_to(examples)
        target = self._cached.target_log_prob(examples)
        return CachedTokens(found[INDEX][row, position], found[LOG_PROB][row, position], target[row, position])


def write_baseline_cache(
    model: PreTrainedModel,
    data_by_domain: Mapping[str, Calibration],
    path: str | Path,
    *,
    top_k: int = TOP_K,
    batch_size: int = 8,
    progress: bool = True,
) -> Path:
    """Compute what a baseline predicts on the rows of an evaluation; an interrupted call goes on.

    Args:
        model: A causal language model.
        data_by_domain: The rows, as for `evaluate_model`.
        path: The file, ending in .safetensors; it must not exist.
        top_k: Logits to keep of each token, all if the vocabulary is smaller; 8 bytes each, and 8 more a token.
        batch_size: Rows in one forward pass.
        progress: Show a bar.

    Raises:
        FileExistsError, OSError, TypeError, ValueError: See `cache_teacher`.
    """
    rows = [row for data in data_by_domain.values() for batch in data.batches for row in _split(_examples(batch))]
    return cache_teacher(
        model,
        rows,
        path,
        top_k=min(top_k, model.config.get_text_config().vocab_size),
        temperature=TEMPERATURE,
        batch_size=batch_size,
        data_collator=_collate,
        progress=progress,
    )


def _examples(batch: CalibrationBatch) -> dict[str, Tensor]:
    """A batch as the training knows it: with labels, without padding among them."""
    inputs = {name: tensor.cpu() for name, tensor in batch.inputs.items()}
    mask = batch.token_mask.cpu()
    labels = inputs["input_ids"].masked_fill(~mask, IGNORED)
    return without_padding({**inputs, "attention_mask": mask.long(), "labels": labels}, "causal")


def _keys(batch: CalibrationBatch) -> list[bytes]:
    return list(example_keys(_examples(batch), "causal"))


def _split(examples: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Rows as they are, padding included, so that the model sees the positions that it sees in the evaluation."""
    number = len(examples["input_ids"])
    return [{name: tensor[row] for name, tensor in examples.items()} for row in range(number)]


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=FILLERS.get(name, 0))
        for name in rows[0]
    }


def save_continuations(
    cache: str | Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, written: list[list[int]]
) -> Path:
    """Keep what a baseline wrote beside its cached logits, in NAME.generations.json."""
    path = _generations_file(cache)
    values = {"prompts": _fingerprint(prompts, max_new_tokens), "continuations": written}
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
    return path


def read_continuations(
    cache: str | Path, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]] | None:
    """What `save_continuations` kept, if it was for the same prompts and length; else None."""
    path = _generations_file(cache)
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values["continuations"] if values["prompts"] == _fingerprint(prompts, max_new_tokens) else None


def _generations_file(cache: str | Path) -> Path:
    return Path(cache).expanduser().with_suffix(".generations.json")


def _fingerprint(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> str:
    return hashlib.sha256(json.dumps([[list(prompt) for prompt in prompts], max_new_tokens]).encode()).hexdigest()
