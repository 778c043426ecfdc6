"""Streaming statistics of one MoE layer: sums over tokens, in memory that does not grow with their number."""

from contextlib import nullcontext

import torch
from torch import Tensor

from ..modeling.offload import fetched
from ..observation.observed import ObservedTokens, RunningExperts, sum_dtype
from ..statistics import STATISTICS
from ..types import LayerStatistics, MoeLayer


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
        self.reads_logits = self._any("logits")
        self.reads_residual = self._any("residual")
        self.reads_gradients = self._any("gradients")
        self.names_of = self._by_kind(gradients=False)
        self.names_after_backward = self._by_kind(gradients=True)
        self.sums: dict[str, Tensor] = {}

    def _any(self, trait: str) -> bool:
        return any(STATISTICS.trait(name, trait, False) for name in self.names)

    def _by_kind(self, *, gradients: bool) -> dict[str, list[str]]:
        """The statistics that read gradients, or the others, by what they are functions of."""
        names_of: dict[str, list[str]] = {"slots": [], "expert": [], "experts": [], "choices": [], "every_expert": []}
        for name in self.names:
            if STATISTICS.trait(name, "gradients", False) == gradients:
                names_of[STATISTICS.trait(name, "of")].append(name)
        return names_of

    @torch.no_grad()
    def update(self, observed: ObservedTokens, layer: MoeLayer | None = None) -> None:
        """Add one batch.

        Args:
            observed: `logits` are only read for statistics of logits.
            layer: To run its experts; not needed where none of the statistics does.
        """
        self._add("num_tokens", observed.token_mask.to(observed.top_k_index.device).sum())
        self._add_all(self.names_of, observed, layer)

    @torch.no_grad()
    def update_after_backward(self, observed: ObservedTokens, layer: MoeLayer) -> None:
        """Add what statistics make of the gradients of a batch that `update` was given before.

        Args:
            observed: With `output_gradients`.
            layer: To run its experts.
        """
        self._add_all(self.names_after_backward, observed, layer)

    def _add_all(self, names_of: dict[str, list[str]], observed: ObservedTokens, layer: MoeLayer | None) -> None:
        for name in names_of["slots"]:
            self._add(name, STATISTICS[name](observed))
        runs_experts = any(names for kind, names in names_of.items() if kind != "slots")
        with fetched(layer.experts) if runs_experts else nullcontext():
            experts = RunningExperts(layer) if runs_experts else None
            if names_of["expert"]:
                self._add_experts(experts, observed, names_of["expert"])
            for name in names_of["experts"]:
                self._add(name, STATISTICS[name](experts, observed))
            if names_of["choices"]:
                for chunk in experts.together(observed):
                    for name in names_of["choices"]:
                        self._add(name, STATISTICS[name](chunk))
            if names_of["every_expert"]:
                for chunk in experts.everywhere(observed):
                    for name in names_of["every_expert"]:
                        self._add(name, STATISTICS[name](chunk))

    def _add_experts(self, experts: RunningExperts, observed: ObservedTokens, names: list[str]) -> None:
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for routed in experts.where_routed(observed):
            for name, found in rows.items():
                found.append(STATISTICS[name](routed))
        for name, found in rows.items():
            self._add(name, torch.stack(found))

    def _add(self, name: str, value: Tensor) -> None:
        value = value.to(self._dtype(name, value.device)) if value.is_floating_point() else value
        if name not in self.sums:
            self.sums[name] = value
        elif name in STATISTICS and STATISTICS.trait(name, "combine") == "max":
            self.sums[name] = torch.maximum(self.sums[name], value)
        else:
            self.sums[name] = self.sums[name] + value

    def _dtype(self, name: str, device: torch.device) -> torch.dtype:
        is_narrow = name in STATISTICS and STATISTICS.trait(name, "precision") == "float32"
        return torch.float32 if is_narrow else sum_dtype(device)

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
            ValueError: No token was seen, or none with its gradients where they are needed, or a sum is NaN or Inf.
        """
        sums = {name: value.cpu() for name, value in self.sums.items()}
        num_tokens = int(sums.pop("num_tokens", 0))
        if num_tokens == 0:
            raise ValueError(
                f"No calibration token reached {layer!r}. Give text that uses it, or leave it out with exclude_layers."
            )
        without = [name for names in self.names_after_backward.values() for name in names if name not in sums]
        if without:
            raise ValueError(
                f"No calibration token whose gradients were taken reached {layer!r}, so {', '.join(without)} is not "
                "known. Raise gradient_tokens, or leave the layer out with exclude_layers."
            )
        for name, value in sums.items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"{name} of {layer!r} is NaN or Inf for expert {spoiled_experts(name, value)[:8]}. "
                    "Check the weights of that layer, or load the model in float32 or bfloat16."
                )
        cpu = torch.device("cpu")
        wide = {n: value.to(self._dtype(n, cpu)) if value.is_floating_point() else value for n, value in sums.items()}
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
