"""Experts whose matrices are a low rank each, of another rank for each expert: packed, without padding."""

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...expert_values import LowRankSparse
from ...types import ExpertWeights, MoeLayer
from .base import FORMS, become, empty_parameters
from .low_rank_sparse import MATRICES, matrix_sizes
from .stack_products import Project, StackedExperts, batched, eager, sliced


@FORMS.register("ranked_low_rank")
class RankedLowRankExperts(StackedExperts):
    """Experts with each matrix W_i (O, I) as left_i (O, r_i) @ right_i (r_i, I); R is the sum of the r_i.

    For each matrix m of gate, up and down that the family has: parameters `{m}_left` (R, O), the columns of the left
    factors as rows, one expert after another, `{m}_right` (R, I), `{m}_bias` (M, O) where there are biases; buffer
    `{m}_rank_offsets` (M + 1,) int64. There is no grouped kernel for groups that differ in rows and columns, so
    experts run one after another on every device.
    """

    form = "ranked_low_rank"
    class_prefix = "RankedLowRank"
    implementations: ClassVar = {"eager": eager, "grouped_mm": sliced, "batched_mm": batched}

    @classmethod
    def build(cls, layer: MoeLayer, layout: dict[str, Any]) -> None:
        """Empty experts with the `num_ranks` of the layout; see `ExpertForm.build`."""
        num_experts, shapes, buffers = layout["num_experts"], {}, {}
        sizes = matrix_sizes(layer)
        for matrix, total in layout["num_ranks"].items():
            outputs, inputs = sizes[matrix]
            shapes |= {f"{matrix}_left": (total, outputs), f"{matrix}_right": (total, inputs)}
            if layer.format.has_bias:
                shapes[f"{matrix}_bias"] = (num_experts, outputs)
            # Some split, for a model with random weights; a checkpoint brings its own.
            buffers[f"{matrix}_rank_offsets"] = torch.arange(num_experts + 1) * total // num_experts
        become(layer, cls, empty_parameters(shapes, layer), buffers)

    @classmethod
    def install(
        cls, layer: MoeLayer, factors: dict[str, list[LowRankSparse]], biases: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Put experts of low ranks in the place of a layer's dense ones, in place; their kept rows must be none.

        Returns:
            What the layer's entry in the layout says about them.
        """
        parameters, buffers = {}, {}
        for matrix, of_expert in factors.items():
            parameters[f"{matrix}_left"] = torch.cat([one.left.T for one in of_expert])
            parameters[f"{matrix}_right"] = torch.cat([one.right for one in of_expert])
            buffers[f"{matrix}_rank_offsets"] = torch.tensor([0, *(one.rank for one in of_expert)]).cumsum(0)
        parameters |= {f"{matrix}_bias": bias for matrix, bias in biases.items()}
        become(layer, cls, parameters, buffers)
        return layer.experts.layout()

    @property
    def num_stored(self) -> int:
        """M."""
        return self.up_rank_offsets.numel() - 1

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices that an expert has."""
        return [matrix for matrix in MATRICES if hasattr(self, f"{matrix}_left")]

    def layout(self) -> dict[str, Any]:
        """What the layer's entry in the layout says about this form."""
        return {"form": self.form, "num_ranks": {m: getattr(self, f"{m}_left").shape[0] for m in self.matrices}}

    def run_with(self, project: Project, inputs: Tensor) -> Tensor:
        """Outputs (S, D) for inputs (S, D)."""
        gate = project("gate", inputs) if hasattr(self, "gate_left") else None
        return self.finish(project("down", self.expert_activation(project("up", inputs), gate)))

    def project(self, matrix: str, expert: int, inputs: Tensor) -> Tensor:
        """Inputs (S, I) times one matrix of one expert, with its bias. (S, O)."""
        start, end = self.host_integers(f"{matrix}_rank_offsets")[expert : expert + 2]
        left, right = (getattr(self, f"{matrix}_{part}")[start:end] for part in ("left", "right"))
        bias = getattr(self, f"{matrix}_bias", None)
        return linear(linear(inputs, right), left.T, bias if bias is None else bias[expert])

    def gathered_project(self, matrix: str, inputs: Tensor, expert: Tensor) -> Tensor:
        """See `StackedExperts`; filled up to the largest rank."""
        offsets = getattr(self, f"{matrix}_rank_offsets")
        on_host = self.host_integers(f"{matrix}_rank_offsets")
        largest = max(end - start for start, end in itertools.pairwise(on_host))
        place = offsets[expert, None] + torch.arange(largest, device=inputs.device)  # (S, R)
        is_own = place < offsets[expert + 1, None]
        place = place.clamp(max=on_host[-1] - 1)
        left, right = (getattr(self, f"{matrix}_{part}")[place] for part in ("left", "right"))
        inner = (right @ inputs[:, :, None])[:, :, 0].masked_fill(~is_own, 0)
        product = (inner[:, None] @ left)[:, 0]
        bias = getattr(self, f"{matrix}_bias", None)
        return product if bias is None else product + bias[expert]

    def densify(self) -> ExpertWeights:
        """The experts as dense matrices; each product is computed in float32 and rounded once."""
        fields = {}
        for matrix in self.matrices:
            left, right = getattr(self, f"{matrix}_left"), getattr(self, f"{matrix}_right")
            ranks = getattr(self, f"{matrix}_rank_offsets").diff().tolist()
            parts = zip(left.split(ranks), right.split(ranks), strict=True)
            fields[matrix] = torch.stack([(a.T.float() @ b.float()).to(left.dtype) for a, b in parts])
        names = [f"{matrix}_bias" for matrix in self.matrices]
        return ExpertWeights(**fields, **{name: getattr(self, name) for name in names if hasattr(self, name)})
