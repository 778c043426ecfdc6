"""How well a model names languages, what it costs, and how it uses its experts."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_mcsmoe.families import find_layers

from .language_names import Collator

Row = dict[str, list[int]]


@dataclass(frozen=True)
class Score:
    """On held-out names."""

    accuracy: float  # share of names whose whole answer is right
    loss: float  # nats per token of the answer, the end token included
    examples: int


def in_batches(rows: list[Row], batch_size: int, pad_token_id: int) -> list[dict[str, Tensor]]:
    """Batches of rows of similar length: less padding."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    collate = Collator(pad_token_id)
    return [collate(ordered[start : start + batch_size]) for start in range(0, len(ordered), batch_size)]


@torch.inference_mode()
def score(model: PreTrainedModel, rows: list[Row], batch_size: int = 256) -> Score:
    """Accuracy and loss of a text-to-text model.

    The answer counts if each of its tokens is the most likely one after those before it: just then greedy decoding
    gives it.
    """
    was_training = model.training
    model.eval()
    right, loss_sum, tokens = 0, 0.0, 0
    for batch in in_batches(rows, batch_size, model.config.pad_token_id):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits, labels = model(**batch).logits.float(), batch["labels"]
        is_target = labels != -100
        right += int(((logits.argmax(-1) == labels) | ~is_target).all(-1).sum())
        loss_sum += float(torch.nn.functional.cross_entropy(logits[is_target], labels[is_target], reduction="sum"))
        tokens += int(is_target.sum())
    model.train(was_training)
    return Score(right / len(rows), loss_sum / tokens, len(rows))


@torch.inference_mode()
def expert_usage(model: PreTrainedModel, rows: list[Row], batch_size: int = 256) -> dict[str, list[float]]:
    """Share of the real tokens that each layer's router sends to each of its slots, by name of the experts."""
    model.eval()
    layers = find_layers(model)
    counts = {layer.name: torch.zeros(layer.num_slots) for layer in layers}
    for batch in in_batches(rows, batch_size, model.config.pad_token_id):
        outputs = model(**batch, output_router_logits=True)
        logits = [*outputs.encoder_router_logits, *outputs.decoder_router_logits]
        for layer, layer_logits in zip(layers, logits, strict=True):
            mask = batch["attention_mask"].bool() if layer.name.startswith("encoder") else batch["labels"] != -100
            counts[layer.name] += torch.bincount(layer_logits.argmax(-1)[mask], minlength=layer.num_slots)
    return {name: (count / count.sum()).tolist() for name, count in counts.items()}


def count_flops(model: PreTrainedModel, batch: dict[str, Tensor]) -> int:
    """Floating point operations of one forward pass: matrix products as torch's own counter sees them.

    It does not see into grouped products, so experts run one by one meanwhile (Switch Transformers' always do). Nor
    does it see fused attention on a CPU: of such models the products of queries with keys and values are missing,
    which are the same in all of them.
    """
    model.eval()
    implementation = getattr(model.config, "_experts_implementation", None)
    if implementation is not None:
        model.set_experts_implementation("eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(**batch)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return counter.get_total_flops()


def tokens_per_second(models: dict[str, PreTrainedModel], batch: dict[str, Tensor], repeats: int = 7) -> dict:
    """Real input tokens per second of each model: the median of `repeats` passes, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(**batch)
                if repeat > 0:  # the first pass warms up
                    seconds[name].append(time.perf_counter() - start)
    tokens = int(batch["attention_mask"].sum())
    return {name: tokens / sorted(taken)[len(taken) // 2] for name, taken in seconds.items()}


def bytes_on_disk(folder: Path) -> int:
    """Bytes of the weights of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
