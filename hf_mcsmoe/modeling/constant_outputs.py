"""What slots of dropped experts add: their gate times a stored vector, beside the output of the other experts."""

from typing import Any

import torch
from torch import Tensor, nn


class ConstantOutputs(nn.Module):
    """One vector for each dropped slot of a layer, in the order of the slots.

    It acts around the experts module and not inside of its forward, so that every implementation of the experts has
    it: a pre-hook notes what the slots of a call add, a hook adds that.

    Args:
        num_constants: R, slots that are dropped.
        hidden_size: D.
        dtype: Of the vectors.
        requires_grad: Of the vectors.
    """

    def __init__(self, num_constants: int, hidden_size: int, dtype: torch.dtype, requires_grad: bool = True):
        super().__init__()
        vectors = torch.zeros(num_constants, hidden_size, dtype=dtype)
        self.vectors = nn.Parameter(vectors, requires_grad=requires_grad)
        self.waiting: Tensor | None = None  # what the call of the experts that is going on adds

    def forward(self, slots: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """What dropped slots add, (T, D) in the dtype of the vectors.

        Args:
            slots: Router slots, (T, k) int64.
            weights: Their weights, (T, k).
            index: The expert map: negative for dropped slots, (N,) int64.
        """
        is_dropped = index < 0
        last = len(self.vectors)  # takes the weights of the other slots
        row_of_slot = torch.where(is_dropped, is_dropped.cumsum(0) - 1, last)
        gates = weights.new_zeros(len(slots), last + 1)
        gates = gates.scatter_add(1, row_of_slot[slots], weights)
        return gates[:, :-1].to(self.vectors.dtype) @ self.vectors


def note_constants(experts: nn.Module, slots: Tensor, weights: Tensor) -> None:
    """Before the experts of a mapped layer run: keep what its constants add, if it has any."""
    constants = getattr(experts, "constant_outputs", None)
    if constants is not None:
        constants.waiting = constants(slots, weights, experts.expert_map.index.to(slots.device))


def add_constants(experts: nn.Module, args: tuple, output: Tensor) -> Tensor:  # noqa: ARG001
    """Forward hook of the experts: add what `note_constants` kept."""
    added, experts.constant_outputs.waiting = experts.constant_outputs.waiting, None
    return output + added.to(output.dtype).reshape(output.shape)


def attach_constants(experts: nn.Module, layout: dict[str, Any], hidden_size: int) -> None:
    """Give an experts module that has its map the constants that the layout says, zeros for now, if it says any.

    Args:
        experts: With `expert_map`, on the device where it computes.
        layout: Entry of the layer; `num_constants` is R.
        hidden_size: D.
    """
    if not layout.get("num_constants"):
        return
    first = next(iter(experts.parameters()))
    constants = ConstantOutputs(layout["num_constants"], hidden_size, first.dtype, first.requires_grad)
    experts.constant_outputs = constants.to(experts.expert_map.index.device)
    experts.register_forward_hook(add_constants)


@torch.no_grad()
def fill_constants(experts: nn.Module, vectors: Tensor) -> None:
    """Store constants (R, D), rounded once to the dtype of the experts."""
    experts.constant_outputs.vectors.copy_(vectors)
