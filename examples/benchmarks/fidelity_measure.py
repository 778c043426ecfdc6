"""One compression, measured: quality, time, memory, bytes and speed of the result."""

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from hf_mcsmoe import Calibration, Recipe, compress_moe
from hf_mcsmoe.evaluation import DomainScore, evaluate_model

SPEED_PASSES = 5
SAMPLE_SECONDS = 0.01  # between two looks at the memory of the process


def scores(
    model: PreTrainedModel, original: PreTrainedModel | None, data: Mapping[str, Calibration]
) -> dict[str, Any]:
    """Loss, its increase, KL and top-1 agreement, overall and by domain; `original` is None for the model itself."""
    evaluation = evaluate_model(model, data, baseline=original, progress=False)
    return {
        "overall": _plain(evaluation.overall),
        "domains": {name: _plain(score) for name, score in evaluation.domains.items()},
    }


def _plain(score: DomainScore) -> dict[str, Any]:
    is_original = score.baseline_loss is None
    return {
        "tokens": score.tokens,
        "loss": score.loss,
        "loss_increase": 0.0 if is_original else score.loss - score.baseline_loss,
        "kl": 0.0 if is_original else score.kl,
        "top1_agreement": 1.0 if is_original else score.top1_agreement,
    }


@torch.no_grad()
def forward_seconds(model: PreTrainedModel, data: Calibration) -> float:
    """Seconds of one plain forward over the calibration tokens, those that are held out included."""
    start = time.perf_counter()
    for batch in data.batches:
        model(**to_device(batch.inputs, model.device), use_cache=False)
    synchronize(model.device)
    return time.perf_counter() - start


def compress(
    model: PreTrainedModel, recipe: Recipe, data: Calibration
) -> tuple[PreTrainedModel, dict[str, float | int]]:
    """The compressed model, with the seconds and the memory that it took beyond what was in use before."""
    start = time.perf_counter()
    with watched_memory(model.device) as memory:
        model = compress_moe(model, recipe, calibration=data, progress=False)
        synchronize(model.device)
    return model, {"seconds": time.perf_counter() - start, "extra_bytes": memory["peak"] - memory["before"]}


@contextmanager
def watched_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Gives "before" and, afterwards, "peak": bytes allocated on a GPU, else the process's resident bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        memory = {"before": torch.cuda.memory_allocated(device)}
        yield memory
        memory["peak"] = torch.cuda.max_memory_allocated(device)
        return
    return_free_memory()  # what earlier results left free would hide what this one takes
    process, stop = psutil.Process(), threading.Event()
    memory = {"before": process.memory_info().rss, "peak": 0}

    def watch() -> None:
        while not stop.is_set():
            memory["peak"] = max(memory["peak"], process.memory_info().rss)
            stop.wait(SAMPLE_SECONDS)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join()


def return_free_memory() -> None:
    """Give the memory of dead objects back to the system, where its C library can."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def tokens_per_second(model: PreTrainedModel, data: Mapping[str, Calibration]) -> float:
    """Real tokens a second of a forward over one batch, the median of some passes after one that warms up."""
    batch = next(iter(data.values())).batches[0]
    inputs = to_device(batch.inputs, model.device)
    seconds = []
    for _ in range(SPEED_PASSES + 1):
        start = time.perf_counter()
        model(**inputs, use_cache=False)
        synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    return int(batch.token_mask.sum()) / statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(inputs: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The arguments of a model where it is."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}
