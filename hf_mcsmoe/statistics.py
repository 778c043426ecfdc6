"""Streaming statistics of one MoE layer: sums over tokens, in memory that does not grow with their number."""

import torch
from torch import Tensor

from .types import LayerStatistics

FIELDS = ("selection_count", "gate_sum", "logit_gram")


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


class StatisticsAccumulator:
    """Adds batches of one layer's routing up to `LayerStatistics`; O(N^2) memory.

    Sums are float64 on the device of the batches, so no batch waits for the device, and the result does not
    depend on how tokens are batched beyond rounding. Accumulators of a data-parallel run can be added.

    Args:
        num_slots: N.
        needs: Fields of `LayerStatistics` to collect; `selection_count` always is.
    """

    def __init__(self, num_slots: int, needs: frozenset[str]):
        unknown = needs - set(FIELDS)
        if unknown:
            raise ValueError(f"Unknown statistics {sorted(unknown)}; known are {FIELDS}.")
        self.num_slots = num_slots
        self.needs = needs | {"selection_count"}
        self.sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, top_k_index: Tensor, top_k_weights: Tensor, token_mask: Tensor, logits: Tensor | None) -> None:
        """Add one batch of T tokens.

        Args:
            top_k_index: Slots that the router chose, (T, k) int64.
            top_k_weights: Weights the block multiplies expert outputs with, (T, k). A slot of weight 0 is not
                counted: that is how skipped slots and tokens beyond an expert's capacity arrive. Nor is an
                index of N or more, an identity expert.
            token_mask: True for tokens that count, (T,) bool.
            logits: Router logits, (T, N); only read for `logit_gram`.
        """
        device = top_k_index.device
        counted = token_mask.to(device)[:, None] & (top_k_weights != 0) & (top_k_index < self.num_slots)
        slots = torch.where(counted, top_k_index, self.num_slots).flatten()  # what does not count goes past the end
        ones = counted.flatten().to(sum_dtype(device))
        self._add("num_tokens", token_mask.to(device).sum())
        self._add("selection_count", self._sum_by_slot(slots, ones).to(torch.int64))
        if "gate_sum" in self.needs:
            gates = torch.where(counted, top_k_weights, 0).flatten().to(ones.dtype)
            self._add("gate_sum", self._sum_by_slot(slots, gates))
        if "logit_gram" in self.needs:
            kept = torch.where(token_mask.to(logits.device)[:, None], logits.float(), 0)
            self._add("logit_gram", (kept.T @ kept).to(sum_dtype(device)))

    def _sum_by_slot(self, slots: Tensor, values: Tensor) -> Tensor:
        sums = values.new_zeros(self.num_slots + 1)
        return sums.index_add_(0, slots, values)[: self.num_slots]

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add(self, other: "StatisticsAccumulator") -> None:
        """Add the sums of another accumulator of the same layer (another process, another part of the data)."""
        for name, value in other.sums.items():
            self._add(name, value)

    @property
    def num_tokens(self) -> int:
        """Tokens seen so far."""
        return int(self.sums.get("num_tokens", 0))

    def finish(self, layer: str) -> LayerStatistics:
        """The sums as a value on the CPU.

        Args:
            layer: Name of the layer, for messages.

        Raises:
            ValueError: No token was seen, or a sum is NaN or Inf.
        """
        sums = {name: value.cpu() for name, value in self.sums.items()}
        num_tokens = int(sums.pop("num_tokens", 0))
        if num_tokens == 0:
            raise ValueError(
                f"No calibration token reached {layer!r}. Give text that uses it, or leave it out with exclude_layers."
            )
        for name, value in sums.items():
            if not torch.isfinite(value).all():
                # One bad logit spoils a row and a column of the Gram; only the diagonal tells whose it was.
                per_slot = value.diagonal() if value.dim() == 2 else value
                slots = (~torch.isfinite(per_slot)).nonzero().flatten().tolist()
                raise ValueError(
                    f"{name} of {layer!r} is NaN or Inf for expert {slots[:8]}. "
                    "Check the weights of that layer, or load the model in float32 or bfloat16."
                )
        wide = {name: value.double() if value.is_floating_point() else value for name, value in sums.items()}
        return LayerStatistics(num_tokens=num_tokens, **wide)
