"""Importance pruning of decomposed experts as a callback of transformers' Trainer."""

import base64
from typing import Any

import safetensors.torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..modeling.densify import harden
from .row_pruner import RowPruner
from .schedule import SparsitySchedule, warmup_steps

logger = logging.get_logger(__name__)


class SparsityScheduleCallback(TrainerCallback, ExportableState):
    """Prunes the sparse parts of decomposed experts while any `Trainer` (TRL's too) trains them.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[SparsityScheduleCallback(final_keep=0.1)])
        trainer.train()
        trainer.save_model("pruned")

    After each optimiser step, the rows with the largest importance stay and the others are zeroed; see `RowPruner`
    for the method. Start from a model decomposed with `keep_rows=1`, so that all rows are there to choose from.

    Gradients are read after the optimiser step and before they are cleared: accumulated over all batches of the
    step, averaged by DDP (so all ranks keep the same rows), unscaled and clipped. A step that the gradient scaler
    skipped is not measured. DeepSpeed and FSDP keep gradients elsewhere and are refused.

    The state (importance and rows) is a part of `trainer_state.json` in each checkpoint, safetensors in base64, about
    7 bytes for each row of S; so `trainer.train(resume_from_checkpoint=...)` goes on exactly, wherever the checkpoint
    was moved to. Resume with the model that the training began with.

    Args:
        final_keep: Share of all rows of all decomposed matrices that stay in the end (paper: 0.1).
        initial_warmup: In the first steps all rows stay: number of steps, or share of the training if below 1
            (paper: 400 of 10000).
        final_warmup: In the last steps the rows do not change any more; likewise (paper: 1600 of 10000).
        beta: Of the moving average of the importance.
        harden: Drop the zero rows from the model when the training ends. Checkpoints of the training have all rows.
            Train further with a new Trainer: the optimiser of this one holds the parameters from before.

    Raises:
        ValueError: When the training begins: a number out of range, a model without decomposed experts that are
            trained, DeepSpeed or FSDP, or a checkpoint without the state of this callback.
    """

    def __init__(
        self,
        final_keep: float = 0.1,
        initial_warmup: float = 0.04,
        final_warmup: float = 0.16,
        beta: float = 0.85,
        harden: bool = True,
    ):
        self.options = {
            "final_keep": final_keep,
            "initial_warmup": initial_warmup,
            "final_warmup": final_warmup,
            "beta": beta,
            "harden": harden,
        }
        self.pruner: RowPruner | None = None  # while training

    def state(self) -> dict[str, Any]:
        """What Trainer writes into a checkpoint."""
        attributes = {}
        if self.pruner is not None:
            tensors = {name: tensor.cpu() for name, tensor in self.pruner.state_dict().items()}
            attributes["saved"] = base64.b64encode(safetensors.torch.save(tensors)).decode("ascii")
        return {"args": self.options, "attributes": attributes}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        model: nn.Module,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Find the sparse parts and the schedule; when resuming, take the state of the checkpoint."""
        used = [name for name in ("deepspeed", "fsdp") if getattr(args, name, None)]
        if used:
            raise ValueError(
                f"{used[0]} is {getattr(args, used[0])!r}, but the pruning reads gradients, which it keeps elsewhere. "
                "Train the decomposed experts with DDP or on one device."
            )
        total, options = state.max_steps, self.options
        warmups = {name: warmup_steps(options[name], total, name) for name in ("initial_warmup", "final_warmup")}
        schedule = SparsitySchedule(total, final_keep=options["final_keep"], **warmups)
        self.pruner = RowPruner(model, schedule, options["beta"])
        if state.global_step > 0:
            self._resume(state)

    def _resume(self, state: TrainerState) -> None:
        """Load what a checkpoint says about this callback."""
        stored = state.stateful_callbacks.get(type(self).__name__)
        if not isinstance(stored, dict) or "saved" not in stored["attributes"]:
            found = "that of several" if isinstance(stored, list) else "none"
            raise ValueError(
                f"The checkpoint at step {state.global_step} should have the state of one {type(self).__name__}, it "
                f"has {found}. Resume from one that was written with a single such callback, or start anew."
            )
        if stored["args"] != self.options:
            logger.warning("The checkpoint was written with %s; going on with %s.", stored["args"], self.options)
        self.pruner.load_state_dict(safetensors.torch.load(base64.b64decode(stored["attributes"]["saved"])))

    def on_optimizer_step(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        optimizer: Any = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Measure and prune; the gradients are still there."""
        step = state.global_step + 1
        if getattr(optimizer, "step_was_skipped", False):  # by the gradient scaler: gradients are infinite
            self.pruner.prune(step, None)
        else:
            self.pruner.step(step)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Say where more rows are left than asked for, and drop the zero ones."""
        rows, budget = self.pruner.num_nonzero_rows(), self.pruner.budget(state.max_steps)
        if rows > budget:
            logger.warning(
                "%d of %d rows are left at step %d of %d, final_keep=%s means %d: the training ended early, or "
                "load_best_model_at_end put back a model from before.",
                *(rows, self.pruner.num_rows, state.global_step, state.max_steps),
                *(self.options["final_keep"], budget),
            )
        if self.options["harden"]:
            harden(self.pruner.model)
        self.pruner = None
