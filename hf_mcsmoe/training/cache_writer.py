"""Making a file of a teacher's top-k logits. E examples, n target tokens of all, k stored logits, V vocabulary."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, default_data_collator
from transformers.utils import logging

from .cached_teacher import KEY_BYTES, TARGET_LOG_PROB, CacheDescription, example_keys
from .live_teacher import LiveTeacher, model_inputs, vocabulary
from .targets import Collator, DistillationCollator, Task, targets_of, task_of
from .token_losses import CHUNK_ELEMENTS, IGNORED, TopKDistribution

NUMPY_TYPES = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "F32": np.dtype("<f4")}
ALIGNMENT = 8  # of the data in the file


def cache_teacher(
    model: PreTrainedModel,
    dataset: Iterable[Any],
    output: str | Path,
    *,
    top_k: int = 64,
    temperature: float = 2.0,
    batch_size: int = 8,
    data_collator: Collator = default_data_collator,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Compute a teacher's logits for all examples once, and keep the `top_k` largest of each target.

    A row of the file is `log softmax(z / T)` at the k likeliest tokens, and in one more column the logarithm of the
    sum of all other probabilities, `log(sum over the other v of softmax(z / T)_v)`: k + 1 outcomes that are a
    distribution. The temperature must be that of the training, because the rest at another one does not follow from
    it. For evaluations there is `log softmax(z)` of the target itself as well, at temperature 1. Bytes: 8 k + 8 a
    target.

    Examples are known by the content of their token ids and labels: the training may shuffle and batch them in any
    way, equal ones are stored once, and an example that is not in the file is refused. The dataset is read twice,
    first to count. The file appears under its name when it is complete; what an interrupted run leaves beside it
    (".NAME.partial") is continued by the next call with the same arguments.

    Args:
        model: The teacher, with or without a device map; in evaluation mode afterwards.
        dataset: Examples as for `Trainer`, those for evaluation included; a list, dataset or anything that can be
            read twice.
        output: The file, ending in .safetensors.
        top_k: k, at most V.
        temperature: T.
        batch_size: Examples in one forward pass.
        data_collator: That of the training; it must make equal labels each time.
        overwrite: Replace a file that exists.
        progress: Show a bar.

    Returns:
        The path of the file.

    Raises:
        FileExistsError: `output` exists, and `overwrite` is False.
        OSError: The disk is too small.
        TypeError: A dataset that can be read only once, or a model without a head that can be distilled.
        ValueError: Numbers out of range, no examples or targets, inputs besides text, logits that are not finite.
    """
    output, task = Path(output).expanduser(), task_of(model)
    vocab_size = vocabulary(model, task)
    _check(output, dataset, overwrite, vocab_size, top_k=top_k, temperature=temperature, batch_size=batch_size)
    collator = DistillationCollator(data_collator, task)
    keys, counts = _count(dataset, collator, task, progress)
    description = CacheDescription(
        task=task,
        teacher=model.config.name_or_path or type(model).__name__,
        temperature=float(temperature),
        top_k=top_k,
        vocab_size=vocab_size,
        num_examples=len(keys),
        num_tokens=sum(counts),
        data_sha256=hashlib.sha256(b"".join(keys)).hexdigest(),
    )
    partial = output.with_name(f".{output.name}.partial")
    tensors = _open_partial(partial, description)
    tensors["offsets"][:] = np.concatenate([[0], np.cumsum(counts)])
    teacher, place_of_key = LiveTeacher(model), {key: place for place, key in enumerate(keys)}
    with logging.tqdm(total=len(keys), desc="Caching logits", unit=" examples", delay=2, disable=not progress) as bar:
        for examples in _missing(dataset, collator, task, place_of_key, tensors["keys"], batch_size, bar):
            _store(teacher, collator(examples), description, place_of_key, tensors)
            bar.update(len(examples))
    for tensor in tensors.values():
        tensor.flush()
    partial.replace(output)
    return output


def _check(output: Path, dataset: Any, overwrite: bool, vocab_size: int, **numbers: float) -> None:
    if output.suffix != ".safetensors":
        raise ValueError(f"output is {str(output)!r}, it must end in .safetensors. Rename it.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output {str(output)!r} exists. Choose another, or set overwrite=True (--overwrite).")
    for name, value in numbers.items():
        most = vocab_size if name == "top_k" else float("inf")
        if not 0 < value <= most:
            raise ValueError(f"{name} is {value}, it must be above 0 and at most {most}. Leave it out.")
    if isinstance(dataset, Iterator):
        raise TypeError(f"The dataset is a {type(dataset).__name__}, which can be read only once. Pass list(dataset).")


def _keys_of(examples: list[Any], collator: DistillationCollator, task: Task) -> tuple[list[bytes], list[int]]:
    """Keys and numbers of targets of some examples."""
    batch = collator(examples)
    targets = targets_of(batch, task)
    counts = (targets.reshape(len(targets), -1) != IGNORED).sum(-1).tolist()
    return list(example_keys(batch, task)), counts


def _count(
    dataset: Iterable[Any], collator: DistillationCollator, task: Task, progress: bool
) -> tuple[list[bytes], list[int]]:
    """The distinct keys in the order of the dataset, and the number of targets of each."""
    counts: dict[bytes, int] = {}
    for example in logging.tqdm(dataset, desc="Reading examples", delay=2, disable=not progress):
        (key,), (count,) = _keys_of([example], collator, task)
        counts[key] = count
    if not sum(counts.values()):
        raise ValueError(
            f"The dataset has {len(counts)} examples, but no target. Check the labels ({IGNORED} is no target)."
        )
    return list(counts), list(counts.values())


def _missing(
    dataset: Iterable[Any],
    collator: DistillationCollator,
    task: Task,
    place_of_key: dict[bytes, int],
    stored: np.ndarray,
    batch_size: int,
    bar: Any,
) -> Iterator[list[Any]]:
    """Batches of the examples that the file does not have yet."""
    done = {place for place in range(len(stored)) if stored[place].any()}
    bar.update(len(done))

    def remaining() -> Iterator[Any]:
        for example in dataset:
            (key,), _ = _keys_of([example], collator, task)
            if key not in place_of_key:
                raise ValueError(
                    "The dataset or the data_collator gives other tokens or labels each time. "
                    "Cache what is fixed: tokenise before, and mask nothing at random."
                )
            if place_of_key[key] not in done:
                done.add(place_of_key[key])
                yield example

    examples = remaining()
    while batch := list(islice(examples, batch_size)):
        yield batch


def _store(
    teacher: LiveTeacher,
    batch: dict[str, Any],
    description: CacheDescription,
    place_of_key: dict[bytes, int],
    tensors: dict[str, np.memmap],
) -> None:
    """Write the distributions of one batch, and then its keys, which say that they are there."""
    task = description.task
    targets = targets_of(batch, task)
    logits = teacher(model_inputs(batch, targets, task, teacher.model)).logits
    for row, key in enumerate(example_keys(batch, task)):
        place = place_of_key[key]
        is_target = targets[row] != IGNORED
        chosen = logits[row][is_target.to(logits.device)]
        found = top_k_distribution(chosen, description.top_k, description.temperature)
        log_prob = found.log_prob.cpu().numpy()
        if np.isnan(log_prob).any():
            raise ValueError(
                f"The teacher's logits of example {place} are not finite. Look for NaN in its weights, or load it in "
                "bfloat16 or float32 instead of float16."
            )
        start, end = tensors["offsets"][place : place + 2]
        tensors["index"][start:end] = found.index.cpu().numpy()
        tensors["log_prob"][start:end] = log_prob
        tensors[TARGET_LOG_PROB][start:end] = _log_prob_of(chosen, targets[row][is_target]).cpu().numpy()
        tensors["keys"][place] = np.frombuffer(key, dtype="<i8")


def top_k_distribution(logits: Tensor, top_k: int, temperature: float) -> TopKDistribution:
    """The k likeliest tokens of each row of logits (n, V) and the mass of the others, at a temperature.

    Computed in float32, in chunks. The mass of the others is summed by itself, not taken from 1.
    """
    indices, log_probs = [logits.new_empty(0, top_k, dtype=torch.int32)], [logits.new_empty(0, top_k + 1).float()]
    for part in logits.split(max(1, CHUNK_ELEMENTS // logits.shape[-1])):
        u = part.float() / temperature
        values, index = u.topk(top_k, dim=-1)
        rest = u.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
        log_probs.append(torch.cat([values, rest], dim=-1) - u.logsumexp(-1, keepdim=True))
        indices.append(index.int())
    return TopKDistribution(torch.cat(indices), torch.cat(log_probs))


def _log_prob_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Log softmax of each row of logits (n, V) at its target (n,), (n,) float32; computed in chunks."""
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    parts = zip(logits.split(size), targets.to(logits.device).split(size), strict=True)
    found = [-nn.functional.cross_entropy(part.float(), target, reduction="none") for part, target in parts]
    return torch.cat(found) if found else logits.new_empty(0).float()


def _open_partial(path: Path, description: CacheDescription) -> dict[str, np.memmap]:
    """The tensors of the unfinished file, to be written: a new one, or that of an interrupted run for the same.

    The format is that of safetensors: the length of the header, the header in JSON, the data. It is written here
    because the library writes a file in one piece from memory.
    """
    num_examples, num_tokens, top_k = description.num_examples, description.num_tokens, description.top_k
    shapes = {
        "keys": ("I64", (num_examples, KEY_BYTES // 8)),
        "offsets": ("I64", (num_examples + 1,)),
        "index": ("I32", (num_tokens, top_k)),
        "log_prob": ("F32", (num_tokens, top_k + 1)),
        TARGET_LOG_PROB: ("F32", (num_tokens,)),
    }
    header: dict[str, Any] = {"__metadata__": description.to_metadata()}
    end = 0
    for name, (kind, shape) in shapes.items():
        start, end = end, end + int(np.prod(shape)) * NUMPY_TYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    beginning = len(text).to_bytes(8, "little") + text
    size = len(beginning) + end
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.stat().st_size != size or _first_bytes(path, len(beginning)) != beginning:
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise OSError(
                f"The file takes {size:,} bytes, but the disk of {str(path.parent)!r} has {free:,} free. "
                "Use a smaller top_k or fewer examples."
            )
        with open(path, "wb") as file:
            file.write(beginning)
            file.truncate(size)  # zeros: no example is there
    return {
        name: np.memmap(path, NUMPY_TYPES[kind], "r+", len(beginning) + header[name]["data_offsets"][0], shape)
        for name, (kind, shape) in shapes.items()
    }


def _first_bytes(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)
