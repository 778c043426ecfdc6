"""Gram matrices of what each stored expert multiplies its matrices with, for decomposition in their metric."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..families import forward_call
from ..modeling.forms import check_forms
from ..modeling.offload import fetched
from ..statistics import sum_dtype
from ..types import MoeLayer
from .decoder_inputs import decoder_modules, with_decoder_inputs
from .in_memory import LayerObserver, announce, cheap_forward, input_device, to_device


class GramObserver(LayerObserver):
    """Hooks of one layer with dense experts, original or behind a map, that sum up the inputs of its experts."""

    def __init__(self, layer: MoeLayer, in_decoder: bool):
        super().__init__(layer, frozenset(), in_decoder)
        self.activation = layer.family.activation(layer)
        self.inward: Tensor | None = None  # (M, D, D): what gate and up are given
        self.outward: Tensor | None = None  # (M, I, I): what down is given

    def _record(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> None:
        counts = self._counted(index.shape[0])[:, None] & (weights != 0)
        with fetched(self.layer.experts):
            stacked = self.layer.family.stack(self.layer, self.layer.expert_parameters)
            experts = self.layer.family.view(self.layer, stacked)
            if self.inward is None:
                sizes, dtype = (self.layer.hidden_size, experts.width), sum_dtype(index.device)
                made = [torch.zeros(experts.num_experts, n, n, dtype=dtype, device=index.device) for n in sizes]
                self.inward, self.outward = made
            for expert in range(experts.num_experts):
                inputs = hidden_states[(counts & (index == expert)).any(1)]
                given = {name: tensor[expert] for name, tensor in experts.tensors().items()}
                up, gate = (
                    linear(inputs, given[name], given.get(f"{name}_bias")) if name in given else None
                    for name in ("up", "gate")
                )
                for total, rows in ((self.inward, inputs.float()), (self.outward, self.activation(up, gate).float())):
                    total[expert] += rows.T @ rows

    def grams(self) -> dict[str, Tensor]:
        """The sums by the matrix that they belong to; "gate" and "up" are one tensor."""
        if self.inward is None:
            return {}
        inward = ("gate", "up") if self.layer.format.has_gate else ("up",)
        return dict.fromkeys(inward, self.inward) | {"down": self.outward}


@torch.no_grad()
def collect_input_grams(
    model: PreTrainedModel, layers: list[MoeLayer], calibration: Calibration, *, progress: bool = True
) -> dict[str, dict[str, Tensor]]:
    """Run the model over the calibration data, and sum the outer products of the inputs of every expert's matrices.

    A token counts for the experts that the router sends it to with a weight other than 0, once for each; padding
    and held-out batches do not. Products are float32, sums float64 (where the device has it).

    Args:
        model: With dense experts in `layers`, merged or not; its mode is restored.
        layers: The layers to watch; `find_layers(model)` or some of them. Memory: M (D^2 + I^2) numbers of 8 bytes
            for each layer on its device, so take them in groups where that is too much.
        calibration: What to run.
        progress: Show a progress bar.

    Returns:
        By name of the layer: "gate" and "up" (M, D, D), "down" (M, I, I), as `decompose_experts` takes them. Zeros
        for an expert that no token reached; an empty dict for a layer that none reached.

    Raises:
        ValueError: The experts of a layer cannot be decomposed.
    """
    for layer in layers:
        check_forms(layer)
    in_decoder = decoder_modules(model)
    observers = [GramObserver(layer, layer.experts in in_decoder) for layer in layers]
    batches = [batch for batch in calibration.batches if not batch.held_out]
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer.attached())
            for batch in tqdm(batches, desc="input Grams", unit="batch", disable=not progress, delay=2):
                batch = with_decoder_inputs(batch, model)
                announce(observers, batch, 0, torch.Generator(), input_device(model))
                inputs: dict[str, Any] = {n: to_device(v, input_device(model)) for n, v in batch.inputs.items()}
                called, inputs = forward_call(model, inputs)
                called(**inputs, **cheap_forward(called))
    finally:
        model.train(was_training)
    return {observer.layer.name: observer.grams() for observer in observers}
