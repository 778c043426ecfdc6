"""Experts that differ from one base by a low rank each: the base is stored once, and used once for each token."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...expert_values import SharedBase
from ...types import ExpertWeights, MoeLayer
from .base import FORMS, become, empty_parameters
from .low_rank_sparse import LowRankSparseExperts, matrix_sizes
from .stack_products import Project, batched, eager, grouped


@FORMS.register("shared_base")
class SharedBaseExperts(LowRankSparseExperts):
    """Experts with each matrix W_i (O, I) as base (O, I) + left_i (O, r) @ right_i (r, I) + S_i of few kept rows.

    Parameters and buffers are those of `LowRankSparseExperts` and `{m}_base` (O, I) for each matrix m. The base of
    gate and up is multiplied with each token once, for all of its experts; the base of down with the weighted sum of
    what the token's experts give it. So a token costs one base and k times a low rank.
    """

    form = "shared_base"
    class_prefix = "SharedBase"
    implementations: ClassVar = {"eager": eager, "grouped_mm": grouped, "batched_mm": batched}

    @classmethod
    def build(cls, layer: MoeLayer, layout: dict[str, Any]) -> None:
        """Empty experts with the `rank` and `num_rows` of the layout; see `ExpertForm.build`."""
        shapes, buffers = cls.tensors_of(layer, layout)
        shapes |= {f"{matrix}_base": size for matrix, size in matrix_sizes(layer).items()}
        become(layer, cls, empty_parameters(shapes, layer), buffers)

    @classmethod
    def install_shared(cls, layer: MoeLayer, shared: SharedBase) -> dict[str, Any]:
        """Put experts with a shared base in the place of a layer's dense ones, in place.

        Returns:
            What the layer's entry in the layout says about them.
        """
        parameters, buffers = cls.pack(shared.factors, shared.biases)
        become(layer, cls, parameters | {f"{matrix}_base": base for matrix, base in shared.bases.items()}, buffers)
        return layer.experts.layout()

    @property
    def shared_names(self) -> tuple[str, ...]:
        """The bases."""
        return tuple(f"{matrix}_base" for matrix in self.matrices)

    @property
    def output_width(self) -> int:
        """D + I: what an expert adds itself, and what is to be multiplied with the base of down."""
        return sum(self.down_base.shape)

    def prepare(self, hidden_states: Tensor) -> Tensor:
        """Hidden states with their products with the bases of up and gate: (T, D + I), or with a gate (T, D + 2 I)."""
        bases = [getattr(self, f"{matrix}_base") for matrix in self.inward]
        return torch.cat([hidden_states, *(linear(hidden_states, base) for base in bases)], dim=1)

    def conclude(self, summed: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        """The base of down on the weighted sum of what the experts of a token give it, and what they add to it."""
        own, inner = summed.split(self.down_base.shape, dim=1)
        return own + linear(inner, self.down_base)

    def run_with(self, project: Project, inputs: Tensor) -> Tensor:
        """(S, D + I) for what `prepare` gives."""
        width, hidden = self.up_base.shape
        rows, *of_base = inputs.split([hidden, *[width] * len(self.inward)], dim=1)
        products = {m: base + project(m, rows) for m, base in zip(self.inward, of_base, strict=True)}
        inner = self.expert_activation(products["up"], products.get("gate"))
        return torch.cat([project("down", inner), inner], dim=1)

    @property
    def inward(self) -> list[str]:
        """The matrices that are multiplied with hidden states."""
        return [matrix for matrix in ("up", "gate") if hasattr(self, f"{matrix}_base")]

    def densify(self) -> ExpertWeights:
        """The experts as dense matrices; each sum is computed in float32 and rounded once."""
        fields = {matrix: self.dense_matrix(matrix) for matrix in self.matrices}
        names = [f"{matrix}_bias" for matrix in self.matrices]
        return ExpertWeights(**fields, **{name: getattr(self, name) for name in names if hasattr(self, name)})

    def dense_matrix(self, matrix: str) -> Tensor:
        """One matrix of all experts, (M, O, I)."""
        base = getattr(self, f"{matrix}_base")
        made = []
        for one in self.factors(matrix):
            whole = base.float() + one.left.float() @ one.right.float()
            made.append(whole.index_add(0, one.rows, one.sparse.float()).to(base.dtype))
        return torch.stack(made)
