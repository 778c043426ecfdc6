"""Experts whose matrices are a low rank plus kept rows."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...expert_values import LowRankSparse
from ...types import ExpertWeights, MoeLayer
from .base import FORMS, become, empty_parameters
from .low_rank_products import gathered_product, grouped_product
from .stack_products import Project, StackedExperts, batched, eager, grouped

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True, eq=False)
class SparsePart:
    """The kept rows of one matrix of all experts of a layer, for whoever trains and prunes them."""

    parameter: nn.Parameter  # (K, I): a row of zeros adds nothing and is dropped by `harden`
    expert_of_row: Tensor  # (K,) int64 ascending
    row: Tensor  # (K,) int64: which row of its expert's matrix


@FORMS.register("low_rank_sparse")
class LowRankSparseExperts(StackedExperts):
    """Experts with each matrix W (O, I) as left (O, r) @ right (r, I) + S, of which K rows are kept in all experts.

    For each matrix m of gate, up and down that the family has: parameters `{m}_left` (M, O, r), `{m}_right`
    (M, r, I), `{m}_sparse` (K, I), `{m}_bias` (M, O) where there are biases; buffers `{m}_rows` (K,) int64, the row
    inside its expert, and `{m}_row_offsets` (M + 1,) int64. The number of rows may differ by expert and matrix.
    A dense matrix is never formed: y = left (right x) + scatter(S_kept x) (Li et al. 2023, https://arxiv.org/abs/
    2310.01334, section 3.3).
    """

    form = "low_rank_sparse"
    class_prefix = "LowRankSparse"
    implementations: ClassVar = {"eager": eager, "grouped_mm": grouped, "batched_mm": batched}

    @classmethod
    def build(cls, layer: MoeLayer, layout: dict[str, Any]) -> None:
        """Empty experts with the `rank` and `num_rows` of the layout; see `ExpertForm.build`."""
        shapes, buffers = cls.tensors_of(layer, layout)
        become(layer, cls, empty_parameters(shapes, layer), buffers)

    @classmethod
    def tensors_of(
        cls, layer: MoeLayer, layout: dict[str, Any]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
        """Shapes of the parameters, and the buffers, that a layout means."""
        num_experts, rank = layout["num_experts"], layout["rank"]
        sizes = matrix_sizes(layer)
        shapes, buffers = {}, {}
        for matrix, kept in layout["num_rows"].items():
            outputs, inputs = sizes[matrix]
            shapes[f"{matrix}_left"] = (num_experts, outputs, rank)
            shapes[f"{matrix}_right"] = (num_experts, rank, inputs)
            shapes[f"{matrix}_sparse"] = (kept, inputs)
            if layer.format.has_bias:
                shapes[f"{matrix}_bias"] = (num_experts, outputs)
            # Some split, for a model with random weights; a checkpoint brings its own.
            offsets = [expert * kept // num_experts for expert in range(num_experts + 1)]
            buffers[f"{matrix}_row_offsets"] = torch.tensor(offsets)
            counts = [end - start for start, end in itertools.pairwise(offsets)]
            buffers[f"{matrix}_rows"] = torch.cat([torch.arange(count) for count in counts])
        return shapes, buffers

    @classmethod
    def install(
        cls, layer: MoeLayer, factors: dict[str, list[LowRankSparse]], biases: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Put decomposed experts in the place of a layer's dense ones, in place.

        Returns:
            What the layer's entry in the layout says about them.
        """
        become(layer, cls, *cls.pack(factors, biases))
        return layer.experts.layout()

    @staticmethod
    def pack(
        factors: dict[str, list[LowRankSparse]], biases: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The parameters and the buffers of decomposed experts."""
        parameters, buffers = {}, {}
        for matrix, of_expert in factors.items():
            kept = torch.tensor([0, *(one.rows.numel() for one in of_expert)])
            parameters[f"{matrix}_left"] = torch.stack([one.left for one in of_expert])
            parameters[f"{matrix}_right"] = torch.stack([one.right for one in of_expert])
            parameters[f"{matrix}_sparse"] = torch.cat([one.sparse for one in of_expert])
            buffers[f"{matrix}_rows"] = torch.cat([one.rows for one in of_expert])
            buffers[f"{matrix}_row_offsets"] = kept.cumsum(0)
        parameters |= {f"{matrix}_bias": bias for matrix, bias in biases.items()}
        return parameters, buffers

    @property
    def num_stored(self) -> int:
        """M."""
        return self.up_left.shape[0]

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices that an expert has."""
        return [matrix for matrix in MATRICES if hasattr(self, f"{matrix}_left")]

    def layout(self) -> dict[str, Any]:
        """What the layer's entry in the layout says about this form."""
        num_rows = {matrix: getattr(self, f"{matrix}_sparse").shape[0] for matrix in self.matrices}
        return {"form": self.form, "rank": self.up_left.shape[2], "num_rows": num_rows}

    def factors(self, matrix: str) -> list[LowRankSparse]:
        """One matrix ("gate", "up" or "down") of each expert, as views of the parameters."""
        left, right, sparse, rows = (getattr(self, f"{matrix}_{part}") for part in ("left", "right", "sparse", "rows"))
        counts = getattr(self, f"{matrix}_row_offsets").diff().tolist()
        parts = zip(left, right, rows.split(counts), sparse.split(counts), strict=True)
        return [LowRankSparse(*part) for part in parts]

    def sparse_parts(self) -> dict[str, SparsePart]:
        """The kept rows of each matrix, by the name of their parameter."""
        parts = {}
        for matrix in self.matrices:
            counts = getattr(self, f"{matrix}_row_offsets").diff()
            expert = torch.arange(self.num_stored, device=counts.device).repeat_interleave(counts)
            name = f"{matrix}_sparse"
            parts[name] = SparsePart(getattr(self, name), expert, getattr(self, f"{matrix}_rows"))
        return parts

    def harden(self) -> dict[str, Any]:
        """Drop the kept rows that are all zero, in place.

        The matrices stay exactly what they are; a product with fewer rows may be rounded differently. Call it before
        an optimiser is made: `{m}_sparse` are new parameters.

        Returns:
            The changed part of the layer's entry in the layout.
        """
        for name, part in self.sparse_parts().items():
            stays = (part.parameter != 0).any(1)
            matrix = name.removesuffix("_sparse")
            counts = part.expert_of_row[stays].bincount(minlength=self.num_stored)
            kept = part.parameter.detach()[stays]
            self.register_parameter(name, nn.Parameter(kept, part.parameter.requires_grad))
            self.register_buffer(f"{matrix}_rows", part.row[stays])
            self.register_buffer(f"{matrix}_row_offsets", torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
        return self.layout()

    def densify(self) -> ExpertWeights:
        """The experts as dense matrices; each product is computed in float32 and rounded once."""
        fields = {matrix: torch.stack([one.dense() for one in self.factors(matrix)]) for matrix in self.matrices}
        names = [f"{matrix}_bias" for matrix in self.matrices]
        return ExpertWeights(**fields, **{name: getattr(self, name) for name in names if hasattr(self, name)})

    @property
    def row_bytes(self) -> int:
        """Of a row of `left`."""
        return self.up_left.shape[2] * self.up_left.element_size()

    def run_with(self, project: Project, inputs: Tensor) -> Tensor:
        """Outputs (S, D) for inputs (S, D)."""
        gate = project("gate", inputs) if hasattr(self, "gate_left") else None
        return self.finish(project("down", self.expert_activation(project("up", inputs), gate)))

    def grouped_project(self, matrix: str, inputs: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """See `StackedExperts`."""
        return grouped_product(self, matrix, inputs, expert, ends)

    def gathered_project(self, matrix: str, inputs: Tensor, expert: Tensor) -> Tensor:
        """See `StackedExperts`."""
        return gathered_product(self, matrix, inputs, expert)

    def project(self, matrix: str, expert: int, inputs: Tensor) -> Tensor:
        """Inputs (S, I) times one matrix of one expert, with its bias. (S, O)."""
        left, right = getattr(self, f"{matrix}_left")[expert], getattr(self, f"{matrix}_right")[expert]
        bias = getattr(self, f"{matrix}_bias", None)
        product = linear(linear(inputs, right), left, bias if bias is None else bias[expert])
        return self.add_rows(product, matrix, expert, inputs)

    def add_rows(self, product: Tensor, matrix: str, expert: int, inputs: Tensor) -> Tensor:
        """Add what the kept rows of one matrix of one expert give for inputs (S, I) to a product (S, O)."""
        start, end = self.host_integers(f"{matrix}_row_offsets")[expert : expert + 2]
        if start == end:
            return product
        added = linear(inputs, getattr(self, f"{matrix}_sparse")[start:end])
        if end - start == product.shape[1]:  # all rows, in order
            return product + added
        return product.index_add(1, getattr(self, f"{matrix}_rows")[start:end], added)


def matrix_sizes(layer: MoeLayer) -> dict[str, tuple[int, int]]:
    """(O, I) of each matrix of an expert."""
    inward = (layer.intermediate_size, layer.hidden_size)
    sizes = {"gate": inward, "up": inward, "down": inward[::-1]}
    return sizes if layer.format.has_gate else {name: sizes[name] for name in ("up", "down")}
