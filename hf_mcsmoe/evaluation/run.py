"""A whole evaluation of a checkpoint: loss, generation check and tasks, with the baseline beside it or before it."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..calibration import Calibration
from .generation import MAX_NEW_TOKENS, check_generation, continuations, end_tokens
from .harness import TaskResult, compare_tasks, run_tasks
from .scores import Evaluation
from .scoring import check_causal, evaluate_model

if TYPE_CHECKING:
    from .cached_baseline import BaselineCache

Load = Callable[[], PreTrainedModel]


@dataclass(frozen=True, eq=False)
class Extras:
    """What is measured besides the loss."""

    tokenizer: Any = None
    prompts: Sequence[Sequence[int]] = ()  # token ids; none: nothing is written
    prompt_source: str = ""  # in words
    max_new_tokens: int = MAX_NEW_TOKENS
    tasks: Sequence[str] = ()  # of lm-eval
    include: Path | None = None  # folder with more tasks
    batch_size: int = 8


@dataclass(frozen=True, eq=False)
class Measured:
    """What one model did with the extras; None: not asked, or not known any more."""

    written: list[list[int]] | None = None
    tasks: dict[str, TaskResult] | None = None


@dataclass(frozen=True, eq=False)
class Baseline:
    """What a model is compared with: a model in memory or its cached logits, and what it did before."""

    reference: "PreTrainedModel | BaselineCache"
    measured: Measured


def evaluate_whole(
    load: Load,
    data_by_domain: Mapping[str, Calibration],
    extras: Extras,
    baseline: Baseline | None = None,
    *,
    progress: bool = True,
) -> tuple[Evaluation, Measured]:
    """Evaluate a model, see `evaluate_model`, with the generation check and the tasks that are asked.

    Args:
        load: Gives the model; called after the baseline was measured.
        data_by_domain: The rows.
        extras: What is measured besides.
        baseline: From `beside` or `one_at_a_time`; None: no comparison.
        progress: Show bars.

    Returns:
        The evaluation, and what the model wrote.

    Raises:
        TypeError, ValueError: See `evaluate_model`.
    """
    model = load()
    reference = None if baseline is None else baseline.reference
    scores = evaluate_model(model, data_by_domain, baseline=reference, progress=progress)
    before = Measured() if baseline is None else baseline.measured
    found = measure(model, extras, progress=progress)
    generation = None
    if found.written is not None:
        generation = check_generation(
            found.written,
            before.written,
            ends=end_tokens(model, extras.tokenizer),
            max_new_tokens=extras.max_new_tokens,
            prompt_source=extras.prompt_source,
        )
    tasks = None if found.tasks is None else compare_tasks(found.tasks, before.tasks)
    return scores.with_(generation=generation, lm_eval=tasks), found


def measure(model: PreTrainedModel, extras: Extras, *, name: str = "model", progress: bool = True) -> Measured:
    """What a model writes and how it does the tasks.

    Args:
        model: A causal language model.
        extras: What is asked.
        name: Of the model, for the progress bar.
        progress: Show bars.

    Raises:
        TypeError: It is no causal language model.
    """
    check_causal(model)
    written = tasks = None
    if extras.prompts and model.can_generate():
        written = continuations(
            model,
            extras.prompts,
            ends=end_tokens(model, extras.tokenizer),
            max_new_tokens=extras.max_new_tokens,
            batch_size=extras.batch_size,
            progress=progress,
            name=name,
        )
    if extras.tasks:
        options = {"include": extras.include, "batch_size": extras.batch_size}
        tasks = run_tasks(model, extras.tokenizer, extras.tasks, **options)
    return Measured(written, tasks)


def beside(load: Load, extras: Extras, *, progress: bool = True) -> Baseline:
    """A baseline that stays in memory beside the model: all scores are exact."""
    model = load()
    return Baseline(model, measure(model, extras, name="baseline", progress=progress))


def one_at_a_time(
    load: Load | None,
    cache: str | Path,
    data_by_domain: Mapping[str, Calibration],
    extras: Extras,
    *,
    progress: bool = True,
) -> Baseline:
    """A baseline of which only a file with its top-k logits is needed, see `BaselineCache`.

    Without the file the baseline is loaded, computes it, and is let go before the model is loaded, so that they never
    share the memory. What it writes is kept beside the file. The file serves for any number of compressed models.

    Args:
        load: Gives the baseline; None: the file must be there, and tasks of the baseline are not run.
        cache: The file, ending in .safetensors.
        data_by_domain: The rows.
        extras: What is measured besides.
        progress: Show bars.

    Raises:
        FileNotFoundError: Neither a file nor a baseline.
        OSError, ValueError: See `write_baseline_cache` and `BaselineCache`.
    """
    from .cached_baseline import BaselineCache, read_continuations, save_continuations, write_baseline_cache

    cache = Path(cache).expanduser()
    reference = BaselineCache(cache, data_by_domain) if cache.exists() or load is None else None
    prompts, most = extras.prompts, extras.max_new_tokens
    written = read_continuations(cache, prompts, most) if prompts and reference is not None else None
    is_complete = reference is not None and not extras.tasks and (written is not None or not prompts)
    if load is None or is_complete:
        return Baseline(reference, Measured(written))
    model = load()
    if reference is None:
        options = {"batch_size": extras.batch_size, "progress": progress}
        write_baseline_cache(model, data_by_domain, cache, **options)
    measured = measure(model, extras, name="baseline", progress=progress)
    if measured.written is not None:
        save_continuations(cache, prompts, most, measured.written)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Baseline(reference or BaselineCache(cache, data_by_domain), measured)
