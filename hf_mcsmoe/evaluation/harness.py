"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), in this process."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .intervals import Estimate, Interval, mean_of_bounded, normal_interval
from .samples import evaluation_mode

PACKAGE = "lm_eval"
BOOTSTRAPS = 1000  # for the standard errors of metrics that are no means; the harness knows how


@dataclass(frozen=True, eq=False)
class TaskMetric:
    """One number of a task."""

    value: float
    standard_error: float | None  # the harness's own; None: it has none
    # By document, where `value` is the mean of these numbers and all lie in [0, 1], as for accuracies; else None.
    value_of_document: dict[int, float] | None


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What the harness found for one task or group of tasks."""

    metrics: dict[str, TaskMetric]  # by the harness's names, "acc,none": metric and filter
    documents: int | None  # None for a group
    num_fewshot: int | None
    task_version: Any


def check_tasks(tasks: Sequence[str], include: str | Path | None = None) -> None:
    """Look whether the harness is installed and knows the tasks, before a model is loaded.

    Args:
        tasks: Names of tasks, groups or tags; "*" matches anything.
        include: Folder with more tasks in YAML files.

    Raises:
        ImportError: lm-eval is not installed.
        FileNotFoundError: There is no folder `include`.
        ValueError: A task that the harness does not know.
    """
    if find_spec(PACKAGE) is None:
        raise ImportError("lm-eval is not installed. Install it: pip install 'hf-mcsmoe[lm-eval]'")
    if include is not None and not Path(include).is_dir():
        raise FileNotFoundError(f"There is no folder {str(include)!r} of tasks. Give one with YAML files of lm-eval.")
    unknown = _unknown(tasks, _manager(tasks, include))
    if unknown:
        raise ValueError(
            f"lm-eval knows no task {unknown[0]!r}. `lm_eval ls tasks` lists its own; give the folder of others."
        )


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    batch_size: int = 8,
) -> dict[str, TaskResult]:
    """Evaluate a causal language model, as it is in memory, on tasks of the harness.

    The seeds of the harness are its defaults; the random generators of this process get their states back. Tasks from
    local files (`dataset_path: json`) need no network.

    Args:
        model: On any device or device map; it gets its mode back.
        tokenizer: The model's.
        tasks: See `check_tasks`.
        include: See `check_tasks`.
        batch_size: Requests in a forward pass.

    Returns:
        Results by the names of tasks and groups.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: No tokenizer.
    """
    if tokenizer is None:
        raise ValueError("Tasks of lm-eval are text, but there is no tokenizer. Save one in the folder of the model.")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _random_states(), evaluation_mode(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=_manager(tasks, include),
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
        )
    return {
        name: TaskResult(
            metrics=_metrics(values, found["samples"].get(name, [])),
            documents=found["n-samples"].get(name, {}).get("effective"),
            num_fewshot=found["n-shot"].get(name),
            task_version=found["versions"].get(name),
        )
        for name, values in found["results"].items()
    }


def compare_tasks(
    results: Mapping[str, TaskResult], baseline: Mapping[str, TaskResult] | None = None
) -> dict[str, Any]:
    """Results as plain values for the report, beside those of a baseline.

    Args:
        results: What `run_tasks` gave for the model.
        baseline: The same for the baseline; None: it was not run.

    Returns:
        "version" of lm-eval, and "tasks" by name, each with "documents", "num_fewshot", "version" and "metrics"; each
        metric has "value", "standard_error", "interval", "baseline", "increase" and "increase_interval". Intervals are
        those of `mean_of_bounded` over the documents, the increase paired by document; for metrics that are no mean
        of numbers in [0, 1] a normal interval of the harness's standard error, and none for the increase.
    """
    tasks = {}
    for name, one in results.items():
        other = baseline[name].metrics if baseline is not None else {}
        tasks[name] = {
            "documents": one.documents,
            "num_fewshot": one.num_fewshot,
            "version": one.task_version,
            "metrics": {key: _compared(metric, other.get(key)) for key, metric in one.metrics.items()},
        }
    return {"version": version(PACKAGE), "tasks": tasks}


def _compared(metric: TaskMetric, baseline: TaskMetric | None) -> dict[str, Any]:
    documents, increase = metric.value_of_document, None
    if documents is not None:
        interval = mean_of_bounded(list(documents.values()), 0.0, 1.0).interval
    else:
        interval = normal_interval(metric.value, metric.standard_error)
    if baseline is not None:
        increase = Estimate(metric.value - baseline.value, None)
        others = baseline.value_of_document
        if documents is not None and others is not None:
            increase = mean_of_bounded([value - others[place] for place, value in documents.items()], -1.0, 1.0)
    return {
        "value": metric.value,
        "standard_error": metric.standard_error,
        "interval": _plain(interval),
        "baseline": None if baseline is None else baseline.value,
        "increase": None if increase is None else increase.value,
        "increase_interval": None if increase is None else _plain(increase.interval),
    }


def _plain(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)


def _metrics(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, TaskMetric]:
    """The numbers of one task; names are "metric,filter", standard errors "metric_stderr,filter"."""
    found = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        error = values.get(f"{name}_stderr,{filtered}")
        documents = {one["doc_id"]: one.get(name) for one in samples if one["filter"] == filtered}
        found[key] = TaskMetric(
            float(value), float(error) if isinstance(error, int | float) else None, _shares(documents, float(value))
        )
    return found


def _shares(documents: dict[int, Any], mean: float) -> dict[int, float] | None:
    """The numbers of the documents, if they are in [0, 1] and have this mean."""
    numbers = list(documents.values())
    if not numbers or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in numbers):
        return None
    is_mean = abs(sum(numbers) / len(numbers) - mean) < 1e-9
    return {place: float(one) for place, one in documents.items()} if is_mean else None


def _manager(tasks: Sequence[str], include: str | Path | None) -> Any:
    """The harness's index of tasks, of the folder alone where that has them all: its own are thousands of files."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if not _unknown(tasks, manager):
            return manager
    return TaskManager(include_path=None if include is None else str(include))


def _unknown(tasks: Sequence[str], manager: Any) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


@contextmanager
def _random_states() -> Iterator[None]:
    """Give the global random generators their states back, which the harness seeds."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
