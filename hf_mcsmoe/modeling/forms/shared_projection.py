"""Experts that work on a few latent numbers of each token: projections into and out of them are shared."""

import math
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations.moe import _grouped_linear

from ...expert_values import SharedProjection
from ...types import ExpertWeights, MoeLayer
from .base import FORMS, become, empty_parameters
from .stack_products import Project, StackedExperts, batched, eager, grouped

MATRICES = ("gate", "up", "down")


@FORMS.register("shared_projection")
class SharedProjectionExperts(StackedExperts):
    """Experts with gate_i = A_i B, up_i = A'_i B and down_i = C A''_i; B (m, D) and C (D, m) are those of all.

    Parameters `inward` B (m, D), `outward` C (D, m), `gate_latent` A and `up_latent` A' (M, I, m), `down_latent` A''
    (M, m, I); `gate_bias` and `up_bias` (M, I), `down_bias` (M, D) where there are biases. B is multiplied with each
    token once, C with the weighted sum of what its experts give, so between them an expert is one of hidden size m.
    """

    form = "shared_projection"
    class_prefix = "SharedProjection"
    implementations: ClassVar = {"eager": eager, "grouped_mm": grouped, "batched_mm": batched}

    @classmethod
    def build(cls, layer: MoeLayer, layout: dict[str, Any]) -> None:
        """Empty experts of `num_experts` with `rank` latent numbers; see `ExpertForm.build`."""
        num_experts, latent = layout["num_experts"], layout["rank"]
        width, hidden = layer.intermediate_size, layer.hidden_size
        inward = ("gate", "up") if layer.format.has_gate else ("up",)
        shapes = {"inward": (latent, hidden), "outward": (hidden, latent)}
        shapes |= {f"{matrix}_latent": (num_experts, width, latent) for matrix in inward}
        shapes["down_latent"] = (num_experts, latent, width)
        if layer.format.has_bias:
            shapes |= {f"{matrix}_bias": (num_experts, width) for matrix in inward}
            shapes["down_bias"] = (num_experts, hidden)
        become(layer, cls, empty_parameters(shapes, layer), {})

    @classmethod
    def install(cls, layer: MoeLayer, shared: SharedProjection) -> dict[str, Any]:
        """Put experts with shared projections in the place of a layer's dense ones, in place.

        Returns:
            What the layer's entry in the layout says about them.
        """
        parameters = {"inward": shared.inward, "outward": shared.outward}
        parameters |= {f"{matrix}_latent": stack for matrix, stack in shared.latent.items()}
        parameters |= {f"{matrix}_bias": bias for matrix, bias in shared.biases.items()}
        become(layer, cls, parameters, {})
        return layer.experts.layout()

    @property
    def num_stored(self) -> int:
        """M."""
        return self.up_latent.shape[0]

    def layout(self) -> dict[str, Any]:
        """What the layer's entry in the layout says about this form."""
        return {"form": self.form, "rank": self.inward.shape[0]}

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Both projections."""
        return ("inward", "outward")

    @property
    def output_width(self) -> int:
        """Latent numbers, m."""
        return self.outward.shape[1]

    @property
    def row_bytes(self) -> int:
        """Of rows of `up_latent` and `down_latent`: what divides both."""
        return self.up_latent.element_size() * math.gcd(*self.up_latent.shape[1:])

    def prepare(self, hidden_states: Tensor) -> Tensor:
        """Latent numbers of tokens, (T, m)."""
        return linear(hidden_states, self.inward)

    def conclude(self, summed: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Hidden states (T, D) from latent numbers (T, m), and the weighted biases of down."""
        output = linear(summed, self.outward)
        if not hasattr(self, "down_bias"):
            return output
        gates = weights.new_zeros(len(index), self.num_stored + 1).scatter_add(1, index, weights)
        return output + (gates[:, :-1].to(output.dtype) @ self.down_bias)

    def run_with(self, project: Project, inputs: Tensor) -> Tensor:
        """Latent outputs (S, m) for latent inputs (S, m)."""
        gate = project("gate", inputs) if hasattr(self, "gate_latent") else None
        return project("down", self.expert_activation(project("up", inputs), gate))

    def project(self, matrix: str, expert: int, inputs: Tensor) -> Tensor:
        """Inputs times the latent matrix of one expert, with the bias of gate and up."""
        bias = self.inner_bias(matrix)
        return linear(inputs, getattr(self, f"{matrix}_latent")[expert], None if bias is None else bias[expert])

    def grouped_project(self, matrix: str, inputs: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """See `StackedExperts`."""
        product, bias = _grouped_linear(inputs, getattr(self, f"{matrix}_latent"), ends), self.inner_bias(matrix)
        return product if bias is None else product + bias[expert]

    def gathered_project(self, matrix: str, inputs: Tensor, expert: Tensor) -> Tensor:
        """See `StackedExperts`."""
        product = (getattr(self, f"{matrix}_latent")[expert] @ inputs[:, :, None])[:, :, 0]
        bias = self.inner_bias(matrix)
        return product if bias is None else product + bias[expert]

    def inner_bias(self, matrix: str) -> Tensor | None:
        """The bias (M, I) of gate or up; None for down, whose bias is added to hidden states."""
        return getattr(self, f"{matrix}_bias", None) if matrix != "down" else None

    def densify(self) -> ExpertWeights:
        """The experts as dense matrices; each product is computed in float32 and rounded once."""
        inward, outward, dtype = self.inward.float(), self.outward.float(), self.up_latent.dtype
        fields = {"down": (outward @ self.down_latent.float()).to(dtype)}
        for matrix in ("gate", "up"):
            if hasattr(self, f"{matrix}_latent"):
                fields[matrix] = (getattr(self, f"{matrix}_latent").float() @ inward).to(dtype)
        names = [f"{matrix}_bias" for matrix in MATRICES]
        return ExpertWeights(**fields, **{name: getattr(self, name) for name in names if hasattr(self, name)})
