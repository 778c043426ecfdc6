"""Pruning the rows of all sparse parts of a model while it trains."""

import math

import torch
from torch import Tensor, nn

from ..modeling.forms.low_rank_sparse import LowRankSparseExperts, SparsePart
from .row_importance import RowImportance, most_important, row_scores
from .schedule import SparsitySchedule


def decomposed_layers(model: nn.Module) -> dict[str, LowRankSparseExperts]:
    """The decomposed experts modules of a model by path, in its order.

    Raises:
        ValueError: There are none.
    """
    layers = {name: one for name, one in model.named_modules() if isinstance(one, LowRankSparseExperts)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no decomposed experts, so there are no rows to prune. "
            "Compress it with a decomposition first."
        )
    return layers


def sparse_parts(model: nn.Module) -> dict[str, SparsePart]:
    """The sparse part of every matrix of the decomposed experts, by the name of its parameter in the model.

    Raises:
        ValueError: There are none.
    """
    layers = decomposed_layers(model).items()
    parts = {f"{path}.{name}": part for path, layer in layers for name, part in layer.sparse_parts().items()}
    shared = {id(part.parameter): name for name, part in reversed(parts.items())}  # under their first name
    return {name: part for name, part in parts.items() if shared[id(part.parameter)] == name}


def count_rows(model: nn.Module) -> int:
    """Rows of all decomposed matrices of a model, whether or not a sparse part stores them."""
    layers = decomposed_layers(model).values()
    lefts = [getattr(layer, f"{matrix}_left") for layer in layers for matrix in layer.matrices]
    return sum(left.shape[0] * left.shape[1] for left in {id(left): left for left in lefts}.values())


class RowPruner:
    """Keeps the most important rows of all sparse parts, fewer from step to step, and zeroes the others.

    The importance pruning of MC-SMoE (Li et al., 2024, section 3.3, https://arxiv.org/abs/2310.01334): one threshold
    for all matrices of all layers, a cubic schedule, importance as in `RowImportance`. Rows that are zeroed get
    gradients as before and come back when their importance is high enough, until the rows of the final phase are
    chosen. The share counts all rows of the matrices, those that a sparse part does not store included.

    Importance is S after the optimiser step times the gradient of that step. A row that was zero in the step's
    forward pass is S = 0 before it: measured there, its importance would only fall, by the slowest rate there is,
    and with a share that never grows no row could ever come back.

    In a training loop of one's own:

        pruner = RowPruner(model, SparsitySchedule(len(loader), 40, 160, final_keep=0.1))
        for step, batch in enumerate(loader, start=1):
            model(**batch).loss.backward()
            optimizer.step()
            pruner.step(step)  # after the optimiser, before the gradients are gone
            optimizer.zero_grad()
        harden(model)  # from hf_mcsmoe.modeling.densify

    Args:
        model: With experts of the form "low_rank_sparse", all rows of which are stored as a rule (`keep_rows=1`).
        schedule: Share of the rows after each step.
        beta: Of the moving average.

    Raises:
        ValueError: No decomposed experts, or their sparse parts are not trained.
    """

    def __init__(self, model: nn.Module, schedule: SparsitySchedule, beta: float = 0.85):
        self.model = model
        self.schedule = schedule
        self.importance = RowImportance(beta)
        self.parts = sparse_parts(model)
        frozen = [name for name, part in self.parts.items() if not part.parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"{frozen[0]!r} and {len(frozen) - 1} more of {len(self.parts)} sparse parts require no gradients, "
                "which their importance is made of. Call requires_grad_(True) on them."
            )
        self.num_rows = count_rows(model)  # what shares are shares of
        self.kept: dict[str, Tensor] = {}  # (K,) bool by name: the rows that stayed; empty while all do
        self.is_final = False  # the rows in `kept` are those of the final phase

    def budget(self, step: int) -> int:
        """How many rows stay after `step` steps: that share of all rows, rounded half up."""
        return math.floor(self.schedule.keep(step) * self.num_rows + 0.5)

    def step(self, step: int) -> None:
        """Measure the importance by the gradients that are there, and prune; after each optimiser step.

        Args:
            step: Optimiser steps taken, this one included: 1, 2, ...

        Raises:
            RuntimeError: No sparse part has a gradient.
        """
        self.prune(step, None if self.is_final else self._scores())

    def prune(self, step: int, scores: dict[str, Tensor] | None) -> None:
        """Zero the rows that do not stay after a step.

        Args:
            step: Optimiser steps taken, this one included: 1, 2, ...
            scores: (K,) of each sparse part by name, averaged in before; None where the step has none, because the
                optimiser skipped it (overflow in half precision).
        """
        if not self.is_final:
            if scores is not None:
                self.importance.update(scores)
            self._choose(step)
        self._zero()

    def _scores(self) -> dict[str, Tensor]:
        """Scores of this step; 0 for a layer that it did not use."""
        gradients = {name: part.parameter.grad for name, part in self.parts.items()}
        if all(gradient is None for gradient in gradients.values()):
            raise RuntimeError(
                "No sparse part has a gradient. Call the pruner before zero_grad; DeepSpeed ZeRO and FSDP keep "
                "gradients where they cannot be read, so train the decomposed experts with DDP or on one device."
            )
        return {
            name: row_scores(part.parameter, part.parameter.new_zeros(()) if gradient is None else gradient)
            for (name, part), gradient in zip(self.parts.items(), gradients.values(), strict=True)
        }

    def _choose(self, step: int) -> None:
        """Which rows stay after `step`; all, without a mask, while the budget does not bind."""
        self.is_final = self.schedule.is_final(step)
        count = self.budget(step)
        if count >= sum(part.row.numel() for part in self.parts.values()):
            return
        average = self.importance.average
        if not average:  # no step so far was taken
            return
        self.kept = most_important(average, count)

    @torch.no_grad()
    def _zero(self) -> None:
        for name, kept in self.kept.items():
            self.parts[name].parameter.masked_fill_(~kept[:, None], 0)

    def num_nonzero_rows(self) -> int:
        """Rows that have a number other than 0."""
        return sum(int((part.parameter != 0).any(1).sum()) for part in self.parts.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Importance, rows that stay, and whether they stay for good: tensors by name, for safetensors."""
        state = {f"importance.{name}": average for name, average in self.importance.average.items()}
        state |= {f"kept.{name}": kept for name, kept in self.kept.items()}
        return state | {"is_final": torch.tensor(self.is_final)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: The state is of a model with other sparse parts.
        """
        rows = {name: part.row.numel() for name, part in self.parts.items()}
        loaded: dict[str, dict[str, Tensor]] = {"importance": {}, "kept": {}}
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            if kind not in loaded:
                continue
            if rows.get(name) != tensor.numel():
                raise ValueError(
                    f"The state has {tensor.numel()} rows for {name!r}, the model has {rows.get(name)}. "
                    "Resume with the model that the training began with, before its rows were dropped."
                )
            loaded[kind][name] = tensor.to(self.parts[name].parameter.device)
        self.importance.average, self.kept = loaded["importance"], loaded["kept"]
        self.is_final = bool(state["is_final"])
