"""Streaming statistics of one MoE layer: sums over tokens, in memory that does not grow with their number."""

from contextlib import nullcontext

import torch
from torch import Tensor

from .modeling.offload import fetched
from .observed import ObservedTokens, RunningExperts, sum_dtype
from .statistics import STATISTICS
from .types import LayerStatistics, MoeLayer


class StatisticsAccumulator:
    """Adds what was observed of one layer up to `LayerStatistics`. Memory: that of the statistics.

    Sums are float64 on the device of the batches, and the result does not depend on how tokens are batched beyond
    rounding. Where only routing is counted, no batch waits for the device. Accumulators of a data-parallel run can be
    added.

    Args:
        num_slots: N.
        needs: Names in `STATISTICS`; `selection_count` always is collected.

    Raises:
        ValueError: A name is not there.
    """

    def __init__(self, num_slots: int, needs: frozenset[str]):
        self.num_slots = num_slots
        self.names = sorted(needs | {"selection_count"})
        self.names_of: dict[str, list[str]] = {"slots": [], "expert": [], "choices": [], "every_expert": []}
        for name in self.names:
            self.names_of[STATISTICS.trait(name, "of")].append(name)
        self.reads_logits = any(STATISTICS.trait(name, "logits", False) for name in self.names)
        self.sums: dict[str, Tensor] = {}

    @property
    def runs_experts(self) -> bool:
        """Whether experts are run again."""
        return any(self.names_of[kind] for kind in ("expert", "choices", "every_expert"))

    @torch.no_grad()
    def update(self, observed: ObservedTokens, layer: MoeLayer | None = None) -> None:
        """Add one batch.

        Args:
            observed: `logits` are only read for statistics of logits.
            layer: To run its experts; not needed where none of the statistics does.
        """
        self._add("num_tokens", observed.token_mask.to(observed.top_k_index.device).sum())
        for name in self.names_of["slots"]:
            self._add(name, STATISTICS[name](observed))
        with fetched(layer.experts) if self.runs_experts else nullcontext():
            experts = RunningExperts(layer) if self.runs_experts else None
            if self.names_of["expert"]:
                self._add_experts(experts, observed)
            if self.names_of["choices"]:
                for chunk in experts.together(observed):
                    for name in self.names_of["choices"]:
                        self._add(name, STATISTICS[name](chunk))
            if self.names_of["every_expert"]:
                for chunk in experts.everywhere(observed):
                    for name in self.names_of["every_expert"]:
                        self._add(name, STATISTICS[name](chunk))

    def _add_experts(self, experts: RunningExperts, observed: ObservedTokens) -> None:
        rows: dict[str, list[Tensor]] = {name: [] for name in self.names_of["expert"]}
        for routed in experts.where_routed(observed):
            for name, found in rows.items():
                found.append(STATISTICS[name](routed))
        for name, found in rows.items():
            self._add(name, torch.stack(found))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.to(sum_dtype(value.device)) if value.is_floating_point() else value
        if name not in self.sums:
            self.sums[name] = value
        elif name in STATISTICS and STATISTICS.trait(name, "combine") == "max":
            self.sums[name] = torch.maximum(self.sums[name], value)
        else:
            self.sums[name] = self.sums[name] + value

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
                raise ValueError(
                    f"{name} of {layer!r} is NaN or Inf for expert {spoiled_experts(name, value)[:8]}. "
                    "Check the weights of that layer, or load the model in float32 or bfloat16."
                )
        wide = {name: value.double() if value.is_floating_point() else value for name, value in sums.items()}
        return LayerStatistics(num_tokens, wide.pop("selection_count"), wide)


def spoiled_experts(name: str, value: Tensor) -> list[int]:
    """Experts whose entries of the statistic `name` are not finite; empty where it has no axis of experts."""
    is_bad = ~torch.isfinite(value)
    if STATISTICS.trait(name, "of") == "expert" or value.dim() <= 1:
        return is_bad.reshape(len(value), -1).any(1).nonzero().flatten().tolist() if value.dim() else []
    if value.shape[0] == value.shape[-1]:
        # One bad logit spoils a row and a column of a Gram; only the diagonal tells whose it was.
        is_bad = is_bad.diagonal()[:, None]
    return is_bad.flatten(1).any(1).nonzero().flatten().tolist()
