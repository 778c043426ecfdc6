"""Experts that are not stacks of dense matrices: a low rank plus kept rows, and neurons packed one after another."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import ExpertWeights


def check_shapes(owner: str, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raise ValueError for a tensor, by name, that has another shape than expected."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} of {owner} has shape {tuple(tensor.shape)}, expected {shape}.")


@dataclass(frozen=True, eq=False)
class LowRankSparse:
    """One matrix (O, I) as `left @ right` plus a matrix of which only some rows are kept.

    The sum of a low rank and a row-sparse matrix is what MC-SMoE stores of merged experts (Li et al. 2023,
    https://arxiv.org/abs/2310.01334, section 3.3). A row is one output feature of the matrix.

    Raises:
        ValueError: Shapes do not fit, or `rows` are not ascending, unique and inside the matrix.
    """

    left: Tensor  # (O, r)
    right: Tensor  # (r, I)
    rows: Tensor  # (K,) int64, ascending and unique in [0, O)
    sparse: Tensor  # (K, I): what is added to these rows

    def __post_init__(self) -> None:
        expected = {
            "left": (self.left, (self.left.shape[0], self.right.shape[0])),
            "rows": (self.rows, (self.sparse.shape[0],)),
            "sparse": (self.sparse, (self.rows.numel(), self.right.shape[1])),
        }
        check_shapes("LowRankSparse", expected)
        if self.rows.dtype != torch.int64:
            raise ValueError(f"rows must be int64, got {self.rows.dtype}.")
        if not self.rows.is_meta and self.rows.numel():
            ascends = bool((self.rows.diff() > 0).all())
            if not ascends or self.rows[0] < 0 or self.rows[-1] >= self.left.shape[0]:
                raise ValueError(f"rows must ascend within 0..{self.left.shape[0] - 1}, got {self.rows.tolist()}.")

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the matrix."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """r, the columns of `left`."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The matrix, (O, I) in the dtype of `left`; computed in float32 and rounded once."""
        product = self.left.float() @ self.right.float()
        return product.index_add(0, self.rows, self.sparse.float()).to(self.left.dtype)


@dataclass(frozen=True, eq=False)
class SharedBase:
    """N experts whose matrices W_i (O, I) are base + left_i right_i + a few rows.

    Raises:
        ValueError: Matrices are missing, or their shapes do not fit.
    """

    bases: dict[str, Tensor]  # by the name of the matrix ("gate", "up", "down"): (O, I)
    factors: dict[str, list[LowRankSparse]]  # of each expert
    biases: dict[str, Tensor]  # (N, O); empty without biases

    def __post_init__(self) -> None:
        if set(self.bases) != set(self.factors):
            raise ValueError(f"SharedBase has bases of {sorted(self.bases)} and factors of {sorted(self.factors)}.")
        for matrix, base in self.bases.items():
            shapes = {one.shape for one in self.factors[matrix]}
            if shapes != {tuple(base.shape)}:
                raise ValueError(f"factors of {matrix} have shapes {sorted(shapes)}, its base {tuple(base.shape)}.")


@dataclass(frozen=True, eq=False)
class SharedProjection:
    """N experts of hidden size m between a projection into their latent numbers and one out of them.

    Raises:
        ValueError: Shapes do not fit.
    """

    inward: Tensor  # (m, D)
    outward: Tensor  # (D, m)
    latent: dict[str, Tensor]  # "gate" (if there is one) and "up" (N, I, m), "down" (N, m, I)
    biases: dict[str, Tensor]  # "gate" and "up" (N, I), "down" (N, D); empty without biases

    def __post_init__(self) -> None:
        size, hidden = self.inward.shape
        num_experts, width, _ = self.latent["up"].shape
        expected = {name: (tensor, (num_experts, width, size)) for name, tensor in self.latent.items()}
        expected["down"] = (self.latent["down"], (num_experts, size, width))
        check_shapes("SharedProjection", expected | {"outward": (self.outward, (hidden, size))})


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """M experts of different widths: the neurons of all experts one after another, P in all.

    Raises:
        ValueError: Shapes do not fit, or `offsets` do not ascend from 0 to P.
    """

    offsets: Tensor  # (M + 1,) int64: expert e has the neurons offsets[e] ... offsets[e + 1] - 1; may have none
    up: Tensor  # (P, D)
    down: Tensor  # (P, D): row a is what neuron a adds to the output, column a of the usual (D, I) matrix
    gate: Tensor | None = None  # (P, D); None for experts without a gate
    up_bias: Tensor | None = None  # (P,)
    gate_bias: Tensor | None = None  # (P,)
    down_bias: Tensor | None = None  # (M, D)

    def __post_init__(self) -> None:
        neurons, hidden = self.up.shape
        expected = {
            "down": (self.down, (neurons, hidden)),
            "gate": (self.gate, (neurons, hidden)),
            "up_bias": (self.up_bias, (neurons,)),
            "gate_bias": (self.gate_bias, (neurons,)),
            "down_bias": (self.down_bias, (self.num_experts, hidden)),
        }
        check_shapes("PackedExperts", expected)
        if self.offsets.dtype != torch.int64 or self.offsets.dim() != 1 or self.num_experts < 1:
            raise ValueError(f"offsets must be (M + 1,) int64, got {tuple(self.offsets.shape)} {self.offsets.dtype}.")
        if not self.offsets.is_meta:
            offsets = self.offsets.tolist()
            if offsets[0] != 0 or offsets[-1] != neurons or offsets != sorted(offsets):
                raise ValueError(f"offsets must ascend from 0 to {neurons}, the neurons of up, got {offsets}.")

    @classmethod
    def from_dense(cls, weights: ExpertWeights) -> "PackedExperts":
        """All neurons of M experts of one width. Copies where the packed order needs it."""
        num_experts, width = weights.num_experts, weights.width
        packed = {name: t.flatten(0, 1) for name, t in weights.tensors().items() if name not in ("down", "down_bias")}
        offsets = torch.arange(num_experts + 1, device=weights.up.device) * width
        down = weights.down.transpose(1, 2).flatten(0, 1)
        return cls(offsets=offsets, down=down, down_bias=weights.down_bias, **packed)

    @classmethod
    def from_experts(cls, experts: Iterable[ExpertWeights]) -> "PackedExperts":
        """Copies of experts of any widths, each given alone, with a leading axis of 1."""
        packed = [cls.from_dense(expert).tensors() for expert in experts]
        widths = torch.tensor([0, *(len(one["up"]) for one in packed)], device=packed[0]["up"].device)
        # Field by field, so that what was joined can go.
        fields = {name: torch.cat([one.pop(name) for one in packed]) for name in tuple(packed[0])}
        return cls(offsets=widths.cumsum(0), **fields)

    @property
    def num_experts(self) -> int:
        """M, experts; those without neurons count."""
        return self.offsets.numel() - 1

    @property
    def num_neurons(self) -> int:
        """P, neurons of all experts."""
        return self.up.shape[0]

    @property
    def widths(self) -> Tensor:
        """Neurons of each expert. (M,) int64."""
        return self.offsets.diff()

    @property
    def expert_of_neuron(self) -> Tensor:
        """The expert that each packed neuron belongs to. (P,) int64, ascending."""
        experts = torch.arange(self.num_experts, device=self.offsets.device)
        return experts.repeat_interleave(self.widths)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of neurons that exist, by field name, and `down_bias`."""
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def expert(self, expert: int) -> ExpertWeights:
        """Expert `expert` alone, as views with a leading axis of 1."""
        start, end = self.offsets[expert].item(), self.offsets[expert + 1].item()
        fields = {name: t[start:end][None] for name, t in self.tensors().items() if name != "down_bias"}
        fields["down"] = fields["down"].transpose(1, 2)
        down_bias = self.down_bias[expert][None] if self.down_bias is not None else None
        return ExpertWeights(down_bias=down_bias, **fields)

    def select_neurons(self, index: Tensor) -> "PackedExperts":
        """The same experts with some of their neurons.

        Args:
            index: Packed neurons that stay, (P',) int64, ascending and unique in [0, P).

        Raises:
            ValueError: `index` is not of that kind.
        """
        index = index.to(self.up.device)
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(f"index must be (P',) int64, got {tuple(index.shape)} {index.dtype}.")
        if index.numel() and (index[0] < 0 or index[-1] >= self.num_neurons or not (index.diff() > 0).all()):
            raise ValueError(f"index must ascend within 0..{self.num_neurons - 1}, got {index.tolist()}.")
        kept = self.expert_of_neuron[index.to(self.offsets.device)].bincount(minlength=self.num_experts)
        offsets = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
        fields = {name: t[index] for name, t in self.tensors().items() if name != "down_bias"}
        return PackedExperts(offsets=offsets, down_bias=self.down_bias, **fields)

    def to_uniform(self, width: int) -> ExpertWeights:
        """The same functions as M experts of one width; what an expert lacks is filled with neurons of zeros.

        A neuron of zeros adds exactly 0: its column of `down` is zero.

        Raises:
            ValueError: An expert is wider than `width`.
        """
        widest = int(self.widths.max())
        if widest > width:
            raise ValueError(
                f"width is {width}, but expert {int(self.widths.argmax())} has {widest} neurons. "
                f"Use at least {widest}."
            )
        expert = self.expert_of_neuron
        place = torch.arange(self.num_neurons, device=expert.device) - self.offsets[expert]
        expert, place = expert.to(self.up.device), place.to(self.up.device)
        fields = {}
        for name, tensor in self.tensors().items():
            if name == "down_bias":
                continue
            fields[name] = tensor.new_zeros(self.num_experts, width, *tensor.shape[1:])
            fields[name][expert, place] = tensor
        fields["down"] = fields["down"].transpose(1, 2)
        return ExpertWeights(down_bias=self.down_bias, **fields)
