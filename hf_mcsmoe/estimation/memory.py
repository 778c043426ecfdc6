"""Bytes in use at the worst moment of each executor, from shapes alone.

T tokens, N slots, M kept experts, k top-k, D hidden size, I width, P neurons of all kept experts.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..executors.in_memory import FIT_HELD_OUT_TOKENS, HELD_OUT_TOKENS
from ..executors.kept_inputs import bytes_per_token, groups_of_layers
from ..executors.wanted import wanted_by
from ..fitting import activation_bytes
from ..layer.beside import shared_width
from ..layer.fit import MOST_JOINT_NEURONS
from ..layer.parts import MOST_NEURONS
from ..recipe import Recipe
from ..selection import SELECTION
from ..sizes import expert_size
from ..types import MoeLayer
from .workload import Workload

# What a statistic holds a layer, in numbers; `precision` says how wide these are.
SINGLE = ("every_expert_count", "stream_energy", "output_gradient_energy")
PER_SLOT = (
    "selection_count gradient_count gate_sum output_max squared_output_norm_sum output_norm_sum gated_output_norm_sum "
    "squared_gate_sum top_logit_sum residual_change_sum"
).split()
PER_PAIR = ("logit_gram", "chosen_gram", "output_cosine_sum")
PER_OUTPUT = ("every_output_sum", "soft_gated_output_sum", "routed_output_sum", "squared_gate_output_sum")
PER_NEURON = ("gated_activation_energy", "gated_activation_peak", "activation_energy", "neuron_gradient_energy")


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for. `peak` is what they can be together; the program itself is not in it."""

    weights: int
    hidden_states: int  # of the calibration rows; what goes layer by layer keeps them from one to the next
    statistics: int
    kept_tokens: int
    activations: int  # of one batch
    layer_work: int  # of compressing one layer

    @property
    def peak(self) -> int:
        """Weights, what calibration left, and the larger of one batch and one layer's work."""
        left = self.weights + self.hidden_states + self.statistics + self.kept_tokens
        return left + max(self.activations, self.layer_work)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "peak": self.peak}


def statistics_bytes(layer: MoeLayer, recipe: Recipe) -> int:
    """Of the sums of one layer, exactly."""
    slots, numbers = layer.num_slots, dict.fromkeys(SINGLE, 1)
    numbers |= dict.fromkeys(PER_SLOT, slots) | dict.fromkeys(PER_PAIR, slots**2)
    numbers |= dict.fromkeys(PER_OUTPUT, slots * layer.hidden_size)
    numbers |= dict.fromkeys(PER_NEURON, slots * layer.intermediate_size)
    names = wanted_by(recipe).statistics | {"selection_count"}
    narrow = 4 * slots * layer.parameters_per_expert if "fisher" in names else 0
    return narrow + sum(8 * numbers[name] for name in names - {"fisher"})


def kept_bytes(layers: list[MoeLayer], recipe: Recipe, work: Workload) -> int:
    """Of the tokens that layers keep at a time."""
    wanted = wanted_by(recipe)
    held_out = min(FIT_HELD_OUT_TOKENS if wanted.keeps_tokens else HELD_OUT_TOKENS, work.num_held_out_tokens)
    fitted = min(recipe.fit_tokens, work.num_tokens) if wanted.keeps_tokens else 0
    together = max(groups_of_layers(layers, work, wanted), key=len)
    of_group = sum(fitted * bytes_per_token(layer, wanted) for layer in together)
    if wanted.targets is not None:  # the stream after all layers at first, and after the one at work
        of_group += (fitted + held_out) * sum(stream_bytes(layer) for layer in [*layers, *together])
    return of_group + sum(held_out * bytes_per_token(layer, wanted) for layer in layers)


def stream_bytes(layer: MoeLayer) -> int:
    """Of the residual stream of one token."""
    return layer.hidden_size * next(iter(layer.expert_parameters.values())).element_size()


def widths_to_select(layer: MoeLayer, recipe: Recipe, num_experts: int) -> tuple[float, float]:
    """(width of an expert before neurons are selected, of the parts that are judged together), both on average."""
    width = layer.intermediate_size * (layer.num_slots / num_experts if recipe.unites else 1)
    return width, width / math.ceil(width / MOST_NEURONS)


def is_judged_jointly(recipe: Recipe, num_neurons: float) -> bool:
    """Whether the selection of a recipe, if any, reads products of neurons of different experts."""
    asks = recipe.selection is not None and "sums" in SELECTION.asks_for(recipe.selection)
    return asks and num_neurons <= MOST_JOINT_NEURONS


def layer_work_bytes(layer: MoeLayer, recipe: Recipe, num_experts: int, work: Workload) -> int:
    """Of compressing one layer: the new experts; where it is fitted all experts in float32, outputs and Grams."""
    size = expert_size(layer)
    total = num_experts * layer.bytes_per_expert
    if not recipe.needs_inputs:
        return total + 2 * 4 * layer.parameters_per_expert
    slots, width, hidden = layer.num_slots, layer.intermediate_size, layer.hidden_size
    tokens = min(recipe.fit_tokens, work.num_tokens) + min(FIT_HELD_OUT_TOKENS, work.num_held_out_tokens)
    neurons = recipe.neurons_per_layer(slots, width, num_experts)
    united, part = widths_to_select(layer, recipe, num_experts)
    share = neurons / (num_experts * united)
    total += 4 * slots * size.matrix_entries + 4 * tokens * (hidden + 2 * slots)
    if united > width:
        total += 4 * slots * size.matrix_entries  # all neurons once more, under the gates of the groups
    grams = int(8 * num_experts * united * part) if recipe.selection is not None and share < 1 else 0
    if share < 1 and is_judged_jointly(recipe, num_experts * united):
        grams += int(24 * (num_experts * united) ** 2 + 24 * num_experts * united * hidden)
    if recipe.allots_neurons and slots * width <= MOST_JOINT_NEURONS:  # all are taken apart beforehand
        grams = max(grams, 8 * slots * width**2 + 24 * slots * width * (slots * width + hidden))
    fitted = 4 * neurons * (size.matrix_entries // width)
    if recipe.refit is not None:
        shared = shared_width(layer, recipe)
        neurons += shared
        joint = 8 * (4 * neurons**2 + 4 * neurons * hidden)
        passes = 16 * (num_experts * (united * share) ** 2 + shared**2) + 40 * neurons * hidden
        fitted += int(joint if neurons <= MOST_JOINT_NEURONS else passes)
    return total + max(grams, fitted)


def batch_bytes(model: Any, layers: list[MoeLayer], recipe: Recipe, work: Workload) -> int:
    """Of one batch on its way through a layer, and of what the statistics run again in float32."""
    routed = max((x.top_k * (x.hidden_size + 3 * x.intermediate_size) for x in layers), default=0)
    runs_again = len(wanted_by(recipe).statistics) > 1 or recipe.needs_inputs
    return activation_bytes(model, work.batch_tokens) + (4 * routed * work.batch_tokens if runs_again else 0)
