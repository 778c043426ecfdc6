"""What models write after the same prompts: loops, ends, lengths, and how long both write the same.

A next-token loss does not show a model that falls into loops as soon as it reads what it wrote itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from ..calibration import Calibration, CalibrationBatch
from ..modeling.offload import execution_device
from .intervals import Estimate, mean_of_bounded, share_of_prompts
from .samples import evaluation_mode, repetition

NGRAM = 4
PROMPT_TOKENS = 32  # from the beginning of a row
MAX_NEW_TOKENS = 64
# Greedy, and nothing that would hide loops; a model's own configuration may ask for it.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


@dataclass(frozen=True)
class Measure:
    """One number a prompt, as a mean over the prompts; the last two are None without a baseline."""

    value: Estimate
    baseline: Estimate | None = None
    increase: Estimate | None = None  # value - baseline, paired by prompt


@dataclass(frozen=True)
class GenerationCheck:
    """What greedy continuations of the same prompts are like; intervals take prompts as independent."""

    prompts: int
    prompt_source: str  # in words
    max_new_tokens: int
    ngram: int
    repetition: Measure  # share of a continuation's n-grams of tokens that occurred in it before, in [0, 1)
    length: Measure  # tokens, the one that ends it left out
    ended: Measure | None  # share of the continuations that ended by themselves; None: no token ends a text
    # Leading tokens that are those of the baseline, of the longer of both continuations, 1: all; None: no baseline.
    same_prefix: Estimate | None = None


def prompts_from_rows(data_by_domain: Mapping[str, Calibration], number: int) -> list[list[int]]:
    """Beginnings of rows as prompts: the first row of each domain, then the second of each, and so on.

    A prompt is the first `PROMPT_TOKENS` real tokens of a row, or half of a shorter row. Rows of fewer than two
    tokens and rows with more than text are left out.

    Args:
        data_by_domain: See `load_evaluation_data`.
        number: Most prompts.

    Returns:
        Token ids; fewer than `number` where there are not so many rows.
    """
    by_domain = [_beginnings(data) for data in data_by_domain.values()]
    longest = max(map(len, by_domain), default=0)
    in_turn = [rows[place] for place in range(longest) for rows in by_domain if place < len(rows)]
    return in_turn[:number]


def _beginnings(data: Calibration) -> list[list[int]]:
    rows = [ids[mask].tolist() for batch in data.batches if _is_text(batch) for ids, mask in _rows(batch)]
    return [row[: min(PROMPT_TOKENS, len(row) // 2)] for row in rows if len(row) > 1]


def _is_text(batch: CalibrationBatch) -> bool:
    return set(batch.inputs) <= TEXT_INPUTS


def _rows(batch: CalibrationBatch) -> Any:
    return zip(batch.inputs["input_ids"], batch.token_mask, strict=True)


def encode_prompts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts.

    Raises:
        ValueError: A prompt has no token.
    """
    prompts = [list(tokenizer(text)["input_ids"]) for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        if not prompt:
            raise ValueError(f"The prompt {text!r} has no token. Give at least one character.")
    return prompts


def end_tokens(model: PreTrainedModel, tokenizer: Any = None) -> list[int]:
    """The tokens that end a text: those of the generation configuration, else the tokenizer's; there may be none."""
    ends = model.generation_config.eos_token_id
    ends = getattr(tokenizer, "eos_token_id", None) if ends is None else ends
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 8,
    progress: bool = True,
    name: str = "model",
) -> list[list[int]]:
    """What a causal language model writes after each prompt, always with the most likely token.

    Prompts of a batch are padded on the left, so that all continue at the same place. A model whose state runs over
    padding may write something else in a padded batch than alone; prompts of equal length, as those from full rows,
    need none.

    Args:
        model: On any device or device map; it gets its mode back.
        prompts: Token ids, at least one each.
        ends: Tokens that end a text.
        max_new_tokens: Most tokens of a continuation.
        batch_size: Most prompts in a batch.
        progress: Show a bar over the prompts.
        name: Of the model, for the bar.

    Returns:
        The new tokens of each prompt, the ending one included if there is one.
    """
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else ends[0] if ends else 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
        **GREEDY,
    )
    device = execution_device(model.get_input_embeddings())
    written: list[list[int]] = []
    with (
        torch.inference_mode(),
        evaluation_mode(model),
        logging.tqdm(
            total=len(prompts), desc=f"Writing, {name}", unit=" prompts", delay=2, disable=not progress
        ) as bar,
    ):
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            inputs = {name: tensor.to(device) for name, tensor in _left_padded(part, pad).items()}
            output = model.generate(**inputs, generation_config=config)
            written += [_until_end(row, ends) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]
            bar.update(len(part))
    return written


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    length = max(map(len, prompts))
    ids = [[pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]


def check_generation(
    written: Sequence[Sequence[int]],
    baseline: Sequence[Sequence[int]] | None,
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    prompt_source: str,
) -> GenerationCheck:
    """Measures of continuations, and of their differences to a baseline's.

    Args:
        written: What `continuations` gave for the model.
        baseline: The same for the baseline, of the same prompts in the same order; None: there is none.
        ends: Tokens that end a text.
        max_new_tokens: As they were made with.
        prompt_source: In words.
    """
    both = [written] if baseline is None else [written, baseline]
    texts = [[_without_end(row, ends) for row in rows] for rows in both]
    repeated = [[repetition(row, NGRAM) for row in rows] for rows in texts]
    lengths = [[float(len(row)) for row in rows] for rows in texts]
    same = None
    if baseline is not None:
        same = mean_of_bounded([_same_prefix(a, b) for a, b in zip(written, baseline, strict=True)], 0.0, 1.0)
    return GenerationCheck(
        prompts=len(written),
        prompt_source=prompt_source,
        max_new_tokens=max_new_tokens,
        ngram=NGRAM,
        repetition=_measure(repeated, 1.0),
        length=_measure(lengths, float(max_new_tokens)),
        ended=_ended([[row[-1] in ends for row in rows] for rows in both]) if ends else None,
        same_prefix=same,
    )


def _without_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    return list(takewhile(lambda token: token not in ends, tokens))


def _same_prefix(a: Sequence[int], b: Sequence[int]) -> float:
    """Leading tokens that are equal, of the longer of both; the ending token counts, so that ends are compared too."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    return same / max(len(a), len(b))


def _measure(values: list[list[float]], most: float) -> Measure:
    means = [mean_of_bounded(of_model, 0.0, most) for of_model in values]
    return Measure(*means, increase=_increase(values, most)) if len(values) > 1 else Measure(*means)


def _ended(values: list[list[bool]]) -> Measure:
    shares = [share_of_prompts(of_model) for of_model in values]
    return Measure(*shares, increase=_increase(values, 1.0)) if len(values) > 1 else Measure(*shares)


def _increase(values: list[list[Any]], most: float) -> Estimate:
    return mean_of_bounded([float(new) - float(old) for new, old in zip(*values, strict=True)], -most, most)
