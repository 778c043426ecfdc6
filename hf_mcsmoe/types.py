"""The values that flow between the steps. N slots, M stored experts, k top-k, D hidden size, I width, T tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .report_types import CompressionReport as CompressionReport
from .report_types import LayerReport as LayerReport
from .report_types import Trial as Trial

if TYPE_CHECKING:
    from .families.base import MoeFamily


@dataclass(frozen=True)
class ExpertFormat:
    """How a model stores its experts; the flags of transformers' `use_experts_implementation`."""

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_interleaved: bool = False


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The matrices of all experts of one layer in one orientation, whatever the family stores.

    The tensors may be views: writing into them writes into the parameters they came from.
    """

    up: Tensor  # (N, I, D)
    down: Tensor  # (N, D, I)
    gate: Tensor | None = None  # (N, I, D); None for experts without a gate
    up_bias: Tensor | None = None  # (N, I)
    down_bias: Tensor | None = None  # (N, D)
    gate_bias: Tensor | None = None  # (N, I)

    def __post_init__(self) -> None:
        num_experts, width, hidden = self.up.shape
        expected = {
            "down": (num_experts, hidden, width),
            "gate": (num_experts, width, hidden),
            "up_bias": (num_experts, width),
            "down_bias": (num_experts, hidden),
            "gate_bias": (num_experts, width),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {shape} beside up {self.up.shape}."
                )

    @property
    def num_experts(self) -> int:
        """N, the experts stacked in dimension 0."""
        return self.up.shape[0]

    @property
    def width(self) -> int:
        """I, the neurons of one expert."""
        return self.up.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that exist, by field name."""
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def neurons(self, expert: int) -> Tensor:
        """All numbers that belong to each neuron of one expert, (I, 2 D or 3 D, plus biases), float32."""
        parts = [tensor[expert].float() for name, tensor in self.tensors().items() if name != "down_bias"]
        rows = [part.T if name == "down" else part for name, part in zip(self._neuron_names(), parts, strict=True)]
        return torch.cat([row if row.dim() == 2 else row[:, None] for row in rows], dim=1)

    def _neuron_names(self) -> list[str]:
        return [name for name in self.tensors() if name != "down_bias"]

    def permute_neurons(self, order: Tensor) -> "ExpertWeights":
        """The same functions with neuron `order[e, a]` of expert e at place a. `order` is (N, I) int64."""
        return ExpertWeights(**{name: permute(name, tensor, order) for name, tensor in self.tensors().items()})


def permute(name: str, tensor: Tensor, order: Tensor) -> Tensor:
    """Reorder the neuron axis of the field `name` of `ExpertWeights`, (N, ...), by `order` (N, I)."""
    order = order.to(tensor.device)
    if name == "down":
        return tensor.gather(2, order[:, None, :].expand_as(tensor))
    if name in ("gate", "up"):
        return tensor.gather(1, order[:, :, None].expand_as(tensor))
    if name == "down_bias":
        return tensor
    return tensor.gather(1, order)


@dataclass(frozen=True, eq=False)
class SharedExpert:
    """An expert beside the routed ones of a layer, which every token goes to."""

    name: str  # its path
    module: nn.Module
    down: nn.Linear  # its last matrix, (D, its width)
    gate: nn.Linear | None  # the sigmoid of its output weighs what the expert gives; None: it counts in full
    in_block: bool  # the block that holds router and experts calls it; else what holds the block does


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """One MoE layer of a model: where its router and experts are, and their sizes."""

    name: str  # path of the experts module
    experts: nn.Module
    router_name: str
    router: nn.Module
    block_name: str  # the module that holds router and experts
    block: nn.Module
    num_slots: int  # N, rows of the router
    num_experts: int  # experts stored; equals N in a model that was never compressed
    top_k: int
    hidden_size: int  # D, what one expert reads and writes
    intermediate_size: int  # I
    format: ExpertFormat
    family: "MoeFamily"
    num_router_groups: int = 1  # group-limited routers choose within groups of N / num_router_groups rows
    experts_per_group: int = 1  # the least number of rows that such a group must keep
    num_passive_rows: int = 0  # rows of the router after the N: identity experts, a skip slot, shared experts
    num_identity_slots: int = 0  # slots N, N + 1, ... that the experts module answers with its input
    shared: SharedExpert | None = None  # whose last matrix can be fitted; None: there is none of that kind

    @property
    def expert_parameters(self) -> dict[str, Tensor]:
        """The parameters that hold one entry per expert, by name in the experts module."""
        return self.family.expert_parameters(self)

    @property
    def parameters_per_expert(self) -> int:
        """Numbers that one expert stores."""
        numel = sum(p.numel() for p in self.expert_parameters.values())
        return (numel - sum(rows.numel() for rows in self.passive_expert_rows.values())) // self.num_experts

    @property
    def passive_expert_rows(self) -> dict[str, Tensor]:
        """What expert parameters hold past the experts, for slots that use none: (Z, ...), by name; mostly empty."""
        if self.num_identity_slots == 0:
            return {}
        rows = {name: p[self.num_experts :] for name, p in self.expert_parameters.items()}
        return {name: tail for name, tail in rows.items() if len(tail)}

    @property
    def bytes_per_expert(self) -> int:
        """Bytes that one expert takes in its present dtype."""
        size = sum(p.numel() * p.element_size() for p in self.expert_parameters.values())
        passive = sum(rows.numel() * rows.element_size() for rows in self.passive_expert_rows.values())
        return (size - passive) // self.num_experts


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums (or maxima) over the calibration tokens of one layer, as the steps of a recipe asked for them."""

    num_tokens: int
    selection_count: Tensor  # (N,) int64: tokens that the router sent to each slot with a non-zero weight
    sums: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # by the name of the statistic; float64 or its `precision`

    def __getitem__(self, name: str) -> Tensor:
        """The statistic `name` of the registry `STATISTICS`.

        Raises:
            KeyError: It was not collected, because no step said that it needs it.
        """
        if name == "selection_count":
            return self.selection_count
        if name not in self.sums:
            raise KeyError(
                f"The statistic {name!r} was not collected, there are {sorted(self.sums)}. "
                "Name it in `needs` where the step is registered."
            )
        return self.sums[name]

    @property
    def usage_frequency(self) -> Tensor:
        """Share of all selections that went to each slot. (N,) float64, sums to 1; all 0 if nothing was selected."""
        total = self.selection_count.sum()
        return self.selection_count.double() / (total if total > 0 else 1)


@dataclass(frozen=True, eq=False)
class ExpertGroups:
    """Which experts become one. M groups of N experts; -1 marks an expert that is dropped."""

    group_of_expert: Tensor  # (N,) int64 in [-1, M)
    dominant_of_group: Tensor  # (M,) int64 in [0, N), ascending

    def __post_init__(self) -> None:
        expected = torch.arange(self.dominant_of_group.numel())
        if not torch.equal(self.dominant_of_group.unique(), self.dominant_of_group):
            # Ascending order keeps the summation order of the experts, so that M = N is bit-identical.
            raise ValueError(f"dominant_of_group must ascend, got {self.dominant_of_group.tolist()}.")
        num_experts = self.group_of_expert.numel()
        if ((self.dominant_of_group < 0) | (self.dominant_of_group >= num_experts)).any():
            raise ValueError(
                f"dominant_of_group must stay in 0..{num_experts - 1}, got {self.dominant_of_group.tolist()}."
            )
        led = self.group_of_expert[self.dominant_of_group]
        if not torch.equal(led, expected):
            raise ValueError(
                f"dominant_of_group must name one expert of each group, in group order: "
                f"its experts are in groups {led.tolist()}, expected {expected.tolist()}."
            )
        if self.group_of_expert.min() < -1 or self.group_of_expert.max() >= expected.numel():
            raise ValueError(
                f"group_of_expert must stay in -1..{expected.numel() - 1}, got {self.group_of_expert.tolist()}."
            )

    @property
    def num_groups(self) -> int:
        """M, the experts that will be stored."""
        return self.dominant_of_group.numel()

    def members(self, group: int) -> Tensor:
        """The experts of a group, its dominant first, then ascending. (m,) int64."""
        members = (self.group_of_expert == group).nonzero().flatten()
        dominant = self.dominant_of_group[group]
        return torch.cat([dominant[None], members[members != dominant]])


@dataclass(frozen=True, eq=False)
class Routing:
    """How router slots reach the stored experts: exactly one of the two."""

    slot_map: Tensor | None = None  # (N,) int64 in [-1, M): mapped layout; -1 adds nothing
    rows: Tensor | None = None  # (M,) int64 ascending: native layout, the router rows that stay
