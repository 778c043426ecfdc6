"""How many rows stay at which step of a training."""

import math
from dataclasses import dataclass


def cubic_schedule(step: int, total_steps: int, initial_warmup: int, final_warmup: int, final_keep: float) -> float:
    """Share of the rows that stay after `step` optimiser steps.

    With T = `total_steps`, T_i = `initial_warmup`, T_f = `final_warmup` and P = `final_keep`:

        step < T_i              1
        T_i <= step < T - T_f   P + (1 - P) (1 - (step - T_i) / (T - T_i - T_f))^3
        T - T_f <= step         P

    The schedule of MC-SMoE's code (Li et al., 2024, https://arxiv.org/abs/2310.01334). The formula printed in the
    paper has T_f in the numerator too, and would keep 166 % of the rows at step T_i of the paper's own setting.

    Args:
        step: Optimiser steps taken, >= 0.
        total_steps: T.
        initial_warmup: T_i, steps in which all rows stay.
        final_warmup: T_f, last steps, in which the rows do not change.
        final_keep: P in [0, 1].

    Returns:
        A number in [P, 1] that never grows with `step`.
    """
    if step < initial_warmup:
        return 1.0
    if step >= total_steps - final_warmup:
        return final_keep
    progress = (step - initial_warmup) / (total_steps - initial_warmup - final_warmup)
    return final_keep + (1 - final_keep) * (1 - progress) ** 3


@dataclass(frozen=True)
class SparsitySchedule:
    """`cubic_schedule` of one training.

    Raises:
        ValueError: `final_keep` is not in [0, 1], a warm-up is negative, or the two are longer than the training.
    """

    total_steps: int
    initial_warmup: int
    final_warmup: int
    final_keep: float

    def __post_init__(self) -> None:
        if isinstance(self.final_keep, bool) or not 0 <= self.final_keep <= 1:
            raise ValueError(f"final_keep is {self.final_keep!r}, it must be in [0, 1]. 0.1 keeps every tenth row.")
        for name in ("initial_warmup", "final_warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r} steps, it must be >= 0.")
        if self.initial_warmup + self.final_warmup > self.total_steps:
            raise ValueError(
                f"initial_warmup is {self.initial_warmup} and final_warmup {self.final_warmup} steps, together they "
                f"must not exceed the {self.total_steps} steps of the training. Train longer or shorten them."
            )

    def keep(self, step: int) -> float:
        """Share of the rows that stay after `step` optimiser steps."""
        return cubic_schedule(step, self.total_steps, self.initial_warmup, self.final_warmup, self.final_keep)

    def is_final(self, step: int) -> bool:
        """Whether the rows that stay after `step` steps stay for good."""
        return step >= self.total_steps - self.final_warmup


def warmup_steps(warmup: float, total_steps: int, name: str) -> int:
    """Steps of a warm-up given as a number of steps (>= 1) or as a share of the training (< 1), rounded up.

    The convention of `TrainingArguments.warmup_steps`.

    Raises:
        ValueError: Negative, or no whole number above 1.
    """
    if isinstance(warmup, bool) or warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
        raise ValueError(
            f"{name} is {warmup!r}, it must be a whole number of steps, or a share of all steps in [0, 1). "
            "0.04 is the paper's 400 of 10000 steps."
        )
    return int(warmup) if warmup >= 1 else math.ceil(warmup * total_steps)
