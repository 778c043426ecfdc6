"""Arguments of a distillation: TrainingArguments and what the loss is made of."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class DistillationArguments(TrainingArguments):
    """`TrainingArguments` with the terms of the loss, see `DistillationTrainer`.

    The loss of a predicted token is
    `task_weight * cross_entropy + distillation_weight * T^2 * KL(teacher || student)`, plus the optional terms.

    The default of `distillation_weight` gives both the same weight; T^2 makes the gradient of the KL independent of T
    to first order (Hinton et al., 2015, https://arxiv.org/abs/1503.02531). MC-SMoE (https://arxiv.org/abs/2310.01334)
    has 0.2 for a KL without T^2, summed over the tokens of a row and averaged over rows, so that it grows with the
    length of the targets: 0.2 there is `0.2 * S / T^2` here for S target tokens a row, e.g. 0.25 for answers of 5
    tokens at T = 2, and 1.0 at 20.

    With `only_routers` nothing but the routers is trained, whatever `freeze_routers` says: with `task_weight=0`,
    `temperature=1` and `learning_rate=5e-5` that is Router KD (2026, https://arxiv.org/abs/2603.02217).

    Raises:
        ValueError: A weight below 0 or not finite, all weights 0, a temperature or chunk that is not positive, or
            label smoothing, in whose place the teacher's distribution is.
    """

    temperature: float = field(
        default=2.0, metadata={"help": "T, by which both models' logits are divided in the KL term."}
    )
    task_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy against the labels."})
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Weight of T^2 * KL(teacher || student) per predicted token."}
    )
    hidden_state_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared error of hidden states relative to the teacher's, mean over layers."},
    )
    router_weight: float = field(
        default=0.0, metadata={"help": "Weight of the KL between the routers' distributions, mean over layers."}
    )
    freeze_routers: bool = field(default=True, metadata={"help": "Do not train the parameters of the routers."})
    only_routers: bool = field(
        default=False, metadata={"help": "Train the parameters of the routers and no others (Router KD)."}
    )
    chunk_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits are float32 at a time in the loss; default: as many as make 64 MB."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the teacher, or a file of cached logits; if none is given in Python."},
    )
    teacher_dtype: str = field(
        default="auto", metadata={"help": "Of the weights of a teacher that is loaded: auto, bfloat16, float32, ..."}
    )
    teacher_device_map: str | None = field(
        default=None, metadata={"help": "As in from_pretrained, e.g. auto; default: the device of the training."}
    )

    def __post_init__(self):
        """Check the fields, before the base class looks at the machine."""
        weights = {
            name: getattr(self, name)
            for name in ("task_weight", "distillation_weight", "hidden_state_weight", "router_weight")
        }
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} is {weight}, it must be finite and at least 0. Use 0 to switch it off.")
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} are all 0, so there is no loss. Set one of them to 1.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature}, it must be finite and above 0. Usual are 1 to 4.")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {self.chunk_tokens}, it must be at least 1. Leave it out for 64 MB.")
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, but it must be 0 here. "
                "The teacher's distribution does its work: raise distillation_weight instead."
            )
        if self.only_routers:
            self.freeze_routers = False
        super().__post_init__()
