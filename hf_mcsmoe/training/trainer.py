"""Recovering a compressed model with a teacher: a Trainer whose loss is distillation. B rows, S tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..publishing.trainer_card import CompressedModelCard
from .arguments import DistillationArguments
from .cached_teacher import INDEX, LOG_PROB, CachedTeacher
from .feature_losses import hidden_state_sums, router_sums
from .live_teacher import LiveTeacher, model_inputs, open_teacher
from .routers import freeze_routers, paired_routers, recorded_logits, train_only_routers
from .targets import DistillationCollator, input_weights, targets_of, task_of
from .token_losses import IGNORED, TopKDistribution, token_losses

NUM_CHECKED_EXAMPLES = 32  # of each dataset, looked up among the cached logits before the training starts


class DistillationTrainer(CompressedModelCard, Trainer):
    """A `Trainer` that lets a compressed model (the student) follow its original (the teacher).

    For causal and sequence-to-sequence language models and sequence classifiers with one label a row, as found by
    transformers' Auto classes. Everything else is Trainer's: gradient accumulation and checkpointing, mixed precision,
    resuming, `torchrun`, FSDP and DeepSpeed by their usual configuration. What it pushes to the Hub has the generated
    card, see `CompressedModelCard`.

    The loss of one optimizer step, over all of its predicted tokens (batches accumulated, processes):

        (task_weight * sum(cross-entropy) + distillation_weight * T^2 * sum(KL(teacher || student)) + ...) / tokens

    Padding and labels of -100 are no tokens (see `without_padding`), so that ragged batches, however they are split,
    give the loss and the gradient of one large batch. The optional terms count per predicted token too: hidden states
    of all layers after the embeddings (`relative_squared_error`), and the distributions of all routers
    (`router_divergence`); the tokens of an encoder by `input_weights`.

    Deviations from MC-SMoE's code (Li et al., 2024, https://arxiv.org/abs/2310.01334): the mean is per token and
    without padding (there: per row, with padding), there is the factor T^2 (there: none), and the student is in
    training mode, with the dropout of its configuration (there: none). The routers are frozen as there.

    The model's own load-balancing and z losses are not part of the loss: models add them to a loss that they compute
    from labels, which they are not given here, and frozen routers could not answer to them.

    While it trains it logs `loss_task` and `loss_kl` (with T^2, without its weight; likewise `loss_hidden` and
    `loss_router`). An evaluation reports `eval_loss`, `eval_loss_task` and `eval_kl` (without T^2, in nats a token),
    all as means over tokens, not over batches.

    Args:
        model: The student: a compressed model, or one wrapped by PEFT. With `freeze_routers` the parameters of its
            routers do not require gradients any more, also afterwards; with `only_routers` all others do not.
        args: `DistillationArguments`.
        teacher: A model (evaluation mode, moved to the device of the training unless it has a device map), its folder
            or Hub id, a file of `cache_teacher` (which must hold the evaluation data too), or None: that of `args`,
            and if there is none either, the task loss alone.
        kwargs: All other arguments of `Trainer`.

    Raises:
        TypeError: Other arguments than `DistillationArguments`, or a model without such a head.
        ValueError: What `open_teacher` refuses, examples that are not in the cache, or a `compute_loss_func`.
    """

    loss_is_scaled_for_ga = True  # divided by all tokens of the accumulated batches, see `compute_loss`

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher: PreTrainedModel | CachedTeacher | str | Path | None = None,
        **kwargs: Any,
    ):
        args = DistillationArguments(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DistillationArguments):
            raise TypeError(
                f"args is {type(args).__name__}, it must be DistillationArguments, which has all its fields."
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func was given, but the loss is that of the distillation. Leave it out.")
        super().__init__(model, args, **kwargs)
        student = self._student()
        self.task = task_of(student)
        self.model_accepts_loss_kwargs = True  # makes Trainer count the predicted tokens
        self.teacher = open_teacher(args.teacher if teacher is None else teacher, student, self.task, args)
        self._routers = paired_routers(self.model, self.teacher.model) if args.router_weight > 0 else []
        self._encoder_modules = set(student.get_encoder().modules()) if self.task == "seq2seq" else set()
        if args.only_routers:
            train_only_routers(self.model)
        elif args.freeze_routers:
            freeze_routers(self.model)
        is_cached = isinstance(self.teacher, CachedTeacher)
        add_teacher = self.teacher.add_to if is_cached else None
        self.data_collator = DistillationCollator(self.data_collator, self.task, add_teacher)
        if is_cached:
            self._check_cached_examples()
        self._running: dict[str, Tensor] = {}  # sums of the parts of the loss since the last log
        self._running_since = 0  # step of that log
        self._evaluated: list[Tensor] | None = None  # while an evaluation runs: sums of its rows

    def _student(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _check_cached_examples(self) -> None:
        """Look a few examples up, evenly over each dataset, so that wrong data is refused before any work."""
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"eval": self.eval_dataset}
        for dataset in (self.train_dataset, *evaluation.values()):
            if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
                step = max(1, len(dataset) // NUM_CHECKED_EXAMPLES)
                for place in range(0, len(dataset), step):
                    self._get_collator_with_removed_columns(self.data_collator)([dataset[place]])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of one batch, already divided by the predicted tokens of the whole step.

        Args:
            model: The student as Trainer wrapped it.
            inputs: The batch.
            return_outputs: Return the logits as well.
            num_items_in_batch: Predicted tokens of the step; None counts those of this batch.

        Returns:
            A scalar, or the scalar and {"loss", "logits"}.
        """
        targets = targets_of(inputs, self.task)
        sums, logits = self._loss_sums(model, inputs, targets)
        if self._evaluated is not None:
            self._remember(targets, sums)
        divisor = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        scale = self._process_scale() if num_items_in_batch is not None else 1
        divisor = torch.as_tensor(divisor, device=logits.device).flatten()[0] / scale
        parts = {name: rows.sum() / divisor for name, rows in sums.items()}
        loss = sum(self._weights()[name] * part for name, part in parts.items() if self._weights()[name] > 0)
        if model.training:
            self._running_since = self._running_since if self._running else self.state.global_step
            for name, part in parts.items():
                self._running[name] = self._running.get(name, 0) + part.detach()
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def _weights(self) -> dict[str, float]:
        args = self.args
        return {
            "loss_task": args.task_weight,
            "loss_kl": args.distillation_weight,
            "loss_hidden": args.hidden_state_weight,
            "loss_router": args.router_weight,
        }

    def _process_scale(self) -> int:
        """What undoes the averaging of gradients over processes, where the divisor counts the tokens of all."""
        if not self.args.average_tokens_across_devices:
            # One process that drives several devices computes the loss once, but its divisor is per device.
            return 1 if self.args.n_gpu <= 1 else 1 / self.args.n_gpu
        return self.accelerator.num_processes // self.get_tp_size()

    def _loss_sums(self, model: nn.Module, batch: dict[str, Any], targets: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Each part of the loss, summed over the tokens of each row, (B,), and the student's logits."""
        wants_states = self.args.hidden_state_weight > 0
        options = {"output_hidden_states": True} if wants_states else {}
        inputs = model_inputs(batch, targets, self.task, self._student())
        students, teachers = zip(*self._routers, strict=True) if self._routers else ((), ())
        with recorded_logits(students) as student_routing:
            outputs = model(**inputs, **options)
        teacher_outputs, teacher_routing = None, []
        if isinstance(self.teacher, LiveTeacher):
            with recorded_logits(teachers) as teacher_routing:
                teacher_outputs = self.teacher(inputs, **options)
        logits = outputs.logits
        sums = self._token_sums(logits, targets, self._distribution(batch, teacher_outputs))
        if wants_states or self._routers:
            weights = self._token_weights(batch, targets)
        if wants_states:
            sums["loss_hidden"] = hidden_state_sums(outputs, teacher_outputs, *weights)
        if self._routers:
            of_layer = [weights[router.module in self._encoder_modules] for router in students]
            sums["loss_router"] = router_sums(student_routing, teacher_routing, of_layer)
        return sums, logits

    def _distribution(self, batch: Mapping[str, Any], teacher_outputs: Any) -> Tensor | TopKDistribution | None:
        if teacher_outputs is not None:
            logits = teacher_outputs.logits
            return logits.reshape(-1, logits.shape[-1])
        if LOG_PROB in batch:
            return TopKDistribution(batch[INDEX], batch[LOG_PROB]).flatten()
        return None

    def _token_sums(
        self, logits: Tensor, targets: Tensor, teacher: Tensor | TopKDistribution | None
    ) -> dict[str, Tensor]:
        temperature = self.args.temperature
        flat = logits.reshape(-1, logits.shape[-1])
        options = {"temperature": temperature, "chunk_tokens": self.args.chunk_tokens}
        cross_entropy, kl = token_losses(flat, targets.flatten(), teacher, **options)
        sums = {"loss_task": cross_entropy.reshape(len(targets), -1).sum(-1)}
        if kl is not None:
            sums["loss_kl"] = temperature**2 * kl.reshape(len(targets), -1).sum(-1)
        return sums

    def _token_weights(self, batch: dict[str, Any], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the tokens that make predictions, and of those that only are read by an encoder, (B, S)."""
        if self.task == "causal":
            weights = (targets != IGNORED).float()
            return weights, weights
        of_inputs = input_weights(batch, targets)
        return (of_inputs if self.task == "classification" else (targets != IGNORED).float()), of_inputs

    def _remember(self, targets: Tensor, sums: dict[str, Tensor]) -> None:
        """Keep the sums of the rows of a batch that is evaluated, those of all processes, repeated rows once."""
        counts = (targets.reshape(len(targets), -1) != IGNORED).sum(-1)
        rows = torch.stack([counts.float(), *(rows.detach().float() for rows in sums.values())], dim=1)
        self._evaluated.append(self.gather_function(rows))
        self._evaluated_names = list(sums)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's, with every part of the loss among the metrics, and all losses as means over tokens."""
        self._evaluated = []
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            batches, self._evaluated = self._evaluated, None
        if batches:
            totals = torch.cat(batches).cpu().double().sum(0)
            means = dict(zip(self._evaluated_names, (totals[1:] / totals[0]).tolist(), strict=True))
            loss = sum(self._weights()[name] * mean for name, mean in means.items() if self._weights()[name] > 0)
            if "loss_kl" in means:
                means["kl"] = means.pop("loss_kl") / self.args.temperature**2
            output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the parts of the loss beside the loss: means over the steps since the last log."""
        if "loss" in logs and self._running:
            steps = self.state.global_step - self._running_since
            names = list(self._running)
            parts = torch.stack([self._running[name].float() for name in names])
            means = self.accelerator.reduce(parts, reduction="mean") / steps
            logs.update(zip(names, means.tolist(), strict=True))
        if "loss" in logs or "train_loss" in logs:  # the latter at the end of the training
            self._running = {}
        super().log(logs, start_time)
