"""What each logit of a batch is to predict, by the kind of task. B rows, S tokens."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel
from transformers.models.auto import modeling_auto

from .token_losses import IGNORED

Task = Literal["causal", "seq2seq", "classification"]
TASKS: tuple[str, ...] = get_args(Task)
CAUSAL_NAMES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
Collator = Callable[[list[Any]], Mapping[str, Any]]


def task_of(model: PreTrainedModel) -> Task:
    """What a model predicts: the next token, the tokens of a decoder, or one class a row.

    Raises:
        TypeError: A model with another head.
        ValueError: A classifier for regression or for several labels at once: its logits are no distribution.
    """
    names = {one.__name__ for one in type(model).__mro__}
    if names & _listed(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):
        problem = getattr(model.config, "problem_type", None)
        if problem in ("regression", "multi_label_classification") or model.config.num_labels < 2:
            raise ValueError(
                f"{type(model).__name__} has problem_type {problem!r} and {model.config.num_labels} label(s), "
                "but only single_label_classification with at least 2 labels has a distribution to distil. "
                "Train this model with transformers' own Trainer."
            )
        return "classification"
    if getattr(model.config, "is_encoder_decoder", False) and model.get_output_embeddings() is not None:
        return "seq2seq"
    if any(names & _listed(mapping) for mapping in CAUSAL_NAMES):
        return "causal"
    raise TypeError(
        f"{type(model).__name__} is neither a causal nor a sequence-to-sequence language model nor a sequence "
        "classifier. Load it with the Auto class of such a head."
    )


def _listed(mapping: Mapping[str, Any]) -> set[str]:
    entries = mapping.values()
    return {name for entry in entries for name in (entry if isinstance(entry, tuple | list) else (entry,))}


def targets_of(batch: Mapping[str, Any], task: Task) -> Tensor:
    """The target of every logit, in the order of the logits: (B, S) int64, or (B,) classes; `IGNORED` for none.

    A causal model predicts at each token the label of the next one. "shift_labels", which padding-free collators
    give, are taken as they are.

    Raises:
        ValueError: The batch has no labels.
    """
    if task == "causal" and batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"The batch has no 'labels', only {sorted(batch)}. Use a collator that makes them, e.g. "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False) or DataCollatorForSeq2Seq(tokenizer)."
        )
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if task == "causal" else labels.long()


def without_padding(batch: dict[str, Any], task: Task) -> dict[str, Any]:
    """The batch with the labels of a causal model taken out where the token, or the one before it, is padding.

    So padding is no target and nothing is predicted from padding, whatever the labels say, and Trainer counts the
    same tokens as the loss does. The first token of a row has none before it, thus no label either.
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if task != "causal" or labels is None:
        return batch
    is_real = torch.ones_like(labels, dtype=torch.bool)
    if mask is not None and mask.shape == labels.shape:
        is_real = mask != 0
    follows = is_real & nn.functional.pad(is_real[:, :-1], (1, 0), value=False)
    return {**batch, "labels": labels.masked_fill(~follows, IGNORED)}


def input_weights(batch: Mapping[str, Any], targets: Tensor) -> Tensor:
    """Weights of the input tokens, (B, S) float32, where targets are not one an input token.

    The real tokens of a row share as many units as the row has targets, so that each row counts by what it
    predicts, and parts of a batch add up to the batch.
    """
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    mask = (mask != 0).float()
    per_row = (targets.reshape(len(targets), -1) != IGNORED).sum(-1, keepdim=True)
    return mask * per_row / mask.sum(-1, keepdim=True).clamp(min=1)


class DistillationCollator:
    """A user's collator, with padding taken out of the labels and, for a cached teacher, its logits added.

    Args:
        collator: Makes a batch of examples.
        task: See `task_of`.
        add_teacher: Adds the teacher's distribution to a batch; None for a live teacher or none.
    """

    def __init__(self, collator: Collator, task: Task, add_teacher: Callable[[dict], dict] | None = None):
        self.collator = collator
        self.task = task
        self.add_teacher = add_teacher

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """The batch of some examples."""
        collated = self.collator(examples)
        batch = dict(collated.data if isinstance(collated, BatchEncoding) else collated)
        batch = without_padding(batch, self.task)
        return batch if self.add_teacher is None else self.add_teacher(batch)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the user's collator, which Trainer saves beside the model."""
        return getattr(self.collator, "tokenizer", None)
