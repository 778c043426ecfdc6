"""The stages of MC-SMoE for a text-to-text model: merge, recover by distillation, decompose, recover again."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.decompose import decompose_merged
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.training import DistillationArguments, DistillationTrainer, SparsityScheduleCallback

from .language_names import Collator
from .scores import Row

CALIBRATION_NAMES = 256  # as in the paper


@dataclass(frozen=True)
class Recovery:
    """How a compressed model is trained; the optimiser is that of the paper's code."""

    steps: int
    learning_rate: float
    batch_size: int = 128
    distillation_weight: float = 1.0
    seed: int = 0


def calibration_data(model: PreTrainedModel, rows: list[Row], seed: int) -> list[dict[str, Tensor]]:
    """One batch of training names with the decoder's inputs that their answers make."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_NAMES]
    batch = Collator(model.config.pad_token_id)([rows[place] for place in order.tolist()])
    labels = batch.pop("labels")
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    batch["decoder_attention_mask"] = (labels != -100).long()
    return [batch]


def merged(full: PreTrainedModel, calibration: list[dict[str, Tensor]], recipe: Recipe) -> PreTrainedModel:
    """A compressed copy of the full model."""
    return compress_moe(copy.deepcopy(full), recipe, calibration=calibration, progress=False)


def decomposed(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """A copy of a merged model in factors; all rows of the sparse parts are there still."""
    model = copy.deepcopy(model)
    decompose_merged(model, rank=rank, keep_rows=1.0, progress=False)
    return model


def recover(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: list[Row],
    how: Recovery,
    folder: Path,
    keep_rows: float | None = None,
) -> PreTrainedModel:
    """Train a compressed model, in place, with frozen routers.

    Args:
        student: The compressed model.
        teacher: The full one.
        rows: Training data.
        how: Steps, learning rate, ...; distillation_weight 0 trains on the labels alone.
        folder: Where Trainer may write.
        keep_rows: Prune the rows of the sparse parts to this share meanwhile; None for experts without.
    """
    arguments = DistillationArguments(
        output_dir=str(folder),
        max_steps=how.steps,
        per_device_train_batch_size=how.batch_size,
        train_sampling_strategy="group_by_length",
        learning_rate=how.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=16,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        weight_decay=0.01,
        optim="adamw_torch_fused",
        distillation_weight=how.distillation_weight,
        logging_steps=math.ceil(how.steps / 4),
        save_strategy="no",
        report_to="none",
        seed=how.seed,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = DistillationTrainer(
        model=student,
        args=arguments,
        teacher=teacher if how.distillation_weight > 0 else None,
        train_dataset=rows,
        data_collator=Collator(student.config.pad_token_id),
        callbacks=[] if keep_rows is None else [SparsityScheduleCallback(final_keep=keep_rows)],
    )
    trainer.train()
    for parameter in student.parameters():
        parameter.requires_grad_(True)  # frozen routers are a matter of this training only
    return student.eval()


def recipe_of(preset: str, **changes: Any) -> Recipe:
    """A preset as the paper runs it, with some fields changed: the first MoE layer is left as it is."""
    return recipe_from_preset(preset, **{"exclude_layers": [0], **changes})
