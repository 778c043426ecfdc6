"""What a model writes: greedy samples, and how much they repeat themselves."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..modeling.offload import execution_device

WORD = re.compile(r"\w+|[^\w\s]")


@contextmanager
def evaluation_mode(*models: PreTrainedModel) -> Iterator[None]:
    """Put the models into evaluation mode; afterwards every submodule has its own mode back."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def generate_samples(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 48
) -> list[str]:
    """What the model writes after each prompt, greedily and with its cache; the prompt itself is left out.

    Prompts run one by one, so that no padding can change what comes out.

    Raises:
        TypeError: `prompts` is a single string.
        ValueError: A prompt has no token.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts is a single string, {prompts!r}. Give a list of strings.")
    end = model.generation_config.eos_token_id
    pad = next(
        (token for token in (tokenizer.pad_token_id, end[0] if isinstance(end, list) else end) if token is not None), 0
    )
    # Sampling values of the model's own configuration would only cause warnings.
    plain = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    config = GenerationConfig(max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad, **plain)
    device = execution_device(model.get_input_embeddings())
    samples = []
    with evaluation_mode(model), torch.inference_mode():
        for prompt in prompts:
            encoded = tokenizer(prompt, return_tensors="pt")
            inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
            length = inputs["input_ids"].shape[1]
            if length == 0:
                raise ValueError(f"The prompt {prompt!r} has no token. Give at least one character.")
            output = model.generate(**inputs, generation_config=config)[0]
            written = output if model.config.is_encoder_decoder else output[length:]
            samples.append(tokenizer.decode(written, skip_special_tokens=True))
    return samples


def repetition(text_or_tokens: str | Sequence[Any], n: int = 4) -> float:
    """Share of the n-grams that occurred before: `1 - distinct n-grams / n-grams`, in [0, 1).

    Args:
        text_or_tokens: A text, which is split into words and single marks, or any sequence of tokens.
        n: Items of an n-gram, at least 1. With fewer items than that there is no n-gram, and the share is 0.

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}, it must be at least 1. 4 finds loops and little else.")
    items = WORD.findall(text_or_tokens) if isinstance(text_or_tokens, str) else list(text_or_tokens)
    grams = list(zip(*(items[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
