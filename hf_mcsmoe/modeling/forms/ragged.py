"""Experts of different widths: the neurons of all experts packed one after another, without padding."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...expert_values import PackedExperts
from ...layer_budget import ALIGNED_NEURONS
from ...types import ExpertWeights, MoeLayer
from .base import FORMS, ExpertForm, become, empty_parameters
from .routed_rows import add_by_expert, run_by_slot, run_sorted, sort_rows


@FORMS.register("ragged")
class RaggedExperts(ExpertForm):
    """Dense experts of different widths, P neurons in all.

    Parameters `gate`, `up` and `down` are (P, D), `gate_bias` and `up_bias` (P,), `down_bias` (M, D); those exist
    that the family has. Buffer `offsets` (M + 1,) tells where experts start. No product is padded except by the
    batched implementation on a GPU. Where all experts keep all neurons the output is that of dense experts up to the
    rounding of products with `down`, which is stored by neuron: that is another operand layout for the same kernel.
    """

    form = "ragged"
    class_prefix = "Ragged"

    @classmethod
    def build(cls, layer: MoeLayer, layout: dict[str, Any]) -> None:
        """Empty experts of `num_experts` with `num_neurons` in all; see `ExpertForm.build`."""
        num_experts, neurons = layout["num_experts"], layout["num_neurons"]
        shapes = {name: (neurons, layer.hidden_size) for name in ("gate", "up", "down")}
        if not layer.format.has_gate:
            del shapes["gate"]
        if layer.format.has_bias:
            shapes |= {f"{name}_bias": (neurons,) for name in shapes if name != "down"}
            shapes["down_bias"] = (num_experts, layer.hidden_size)
        # Some split, for a model with random weights; a checkpoint brings its own.
        offsets = torch.arange(num_experts + 1) * neurons // num_experts
        become(layer, cls, empty_parameters(shapes, layer), {"offsets": offsets})

    @classmethod
    def install(cls, layer: MoeLayer, packed: PackedExperts) -> dict[str, Any]:
        """Put packed experts in the place of a layer's dense ones, in place.

        Returns:
            What the layer's entry in the layout says about them.
        """
        become(layer, cls, packed.tensors(), {"offsets": packed.offsets})
        return layer.experts.layout()

    @property
    def num_stored(self) -> int:
        """M."""
        return self.offsets.numel() - 1

    def layout(self) -> dict[str, Any]:
        """What the layer's entry in the layout says about this form."""
        return {"form": self.form, "num_neurons": self.up.shape[0]}

    def packed(self) -> PackedExperts:
        """The experts as a value that shares memory with the parameters."""
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return PackedExperts(self.offsets, **{name: getattr(self, name) for name in names if hasattr(self, name)})

    def densify(self) -> ExpertWeights:
        """All experts as wide as the widest, filled with neurons of zeros: exactly the same function.

        The width is rounded up to a multiple of 8, because grouped kernels take rows of whole 16 bytes only.
        """
        packed = self.packed()
        widest = max(1, int(packed.widths.max()))
        return packed.to_uniform(-(-widest // ALIGNED_NEURONS) * ALIGNED_NEURONS)

    def run_expert(self, expert: int, inputs: Tensor) -> Tensor:
        """Output (S, D) of one expert for inputs (S, D)."""
        start, end = self.host_integers("offsets")[expert : expert + 2]
        hidden = self.activate(inputs, slice(start, end))
        # down is stored by neuron; its transpose is what linear takes.
        bias = self.down_bias[expert] if hasattr(self, "down_bias") else None
        return self.finish(linear(hidden, self.down[start:end].T, bias))

    def activate(self, inputs: Tensor, neurons: slice) -> Tensor:
        """What neurons (a slice of all) answer to inputs (S, D)."""
        up = linear(inputs, self.up[neurons], self.up_bias[neurons] if hasattr(self, "up_bias") else None)
        if not hasattr(self, "gate"):
            return self.expert_activation(up, None)
        gate = linear(inputs, self.gate[neurons], self.gate_bias[neurons] if hasattr(self, "gate_bias") else None)
        return self.expert_activation(up, gate)

    def run_rows(self, inputs: Tensor, expert: Tensor) -> Tensor:
        """Output (S, D) for inputs (S, D), each for its own expert (S,); pads to the widest expert."""
        offsets = self.host_integers("offsets")
        widest = max(end - start for start, end in itertools.pairwise(offsets))
        place = torch.arange(widest, device=inputs.device)
        neurons = self.offsets[expert, None] + place  # (S, W)
        is_own = neurons < self.offsets[expert + 1, None]
        neurons = neurons.clamp(max=max(offsets[-1] - 1, 0))
        hidden = {name: self.gathered_product(name, inputs, neurons) for name in ("up", "gate") if hasattr(self, name)}
        hidden = self.expert_activation(hidden["up"], hidden.get("gate")).masked_fill(~is_own, 0)
        output = torch.bmm(hidden[:, None], self.down[neurons])[:, 0]
        return self.finish(output + self.down_bias[expert] if hasattr(self, "down_bias") else output)

    def gathered_product(self, name: str, inputs: Tensor, neurons: Tensor) -> Tensor:
        """Products of inputs (S, D) with rows `neurons` (S, W) of `gate` or `up`, with their biases. (S, W)."""
        product = torch.bmm(getattr(self, name)[neurons], inputs[:, :, None])[:, :, 0]
        bias = getattr(self, f"{name}_bias", None)
        return product if bias is None else product + bias[neurons]


def eager(module: RaggedExperts, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Expert by expert, each adding to the output in turn."""
    rows = sort_rows(index, weights, module.num_stored)
    return add_by_expert(module.run_expert, hidden_states, rows, hidden_states.shape[1])


def grouped(module: RaggedExperts, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Slices of sorted rows with slices of neurons, then one sum over each token's choices.

    There is no grouped kernel for groups that differ in rows and in columns, so experts run one after another on
    every device, after one synchronisation for the number of rows of each.
    """
    rows = sort_rows(index, weights, module.num_stored)
    return run_sorted(module.run_expert, hidden_states, rows, hidden_states.shape[1])


def batched(module: RaggedExperts, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each routed slot with its own neurons: for few tokens. On the CPU slices of neurons, which are not copied."""
    if hidden_states.device.type == "cpu":
        return grouped(module, hidden_states, index, weights)
    return gathered(module, hidden_states, index, weights)


def gathered(module: RaggedExperts, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each routed slot with a copy of its neurons, filled up to the widest expert: the host waits for nothing."""
    return run_by_slot(module.run_rows, hidden_states, index, weights, module.num_stored)


RaggedExperts.implementations = {"eager": eager, "grouped_mm": grouped, "batched_mm": batched}
