"""Floating-point operations of calibration and of the steps, 2 for each multiplication of matrix products.

T tokens, N slots, M kept experts, k top-k, D hidden size, I width, E = matrix entries of an expert.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..executors.in_memory import FIT_HELD_OUT_TOKENS, HELD_OUT_TOKENS
from ..executors.wanted import wanted_by
from ..families import find_layers
from ..layer.beside import shared_width
from ..layer.fit import MOST_JOINT_NEURONS
from ..loading import empty_model
from ..observation.layer_inputs import gives_routed_output
from ..recipe import Recipe
from ..refit.least_squares import JUDGED_COLUMNS
from ..sizes import expert_size
from ..statistics import STATISTICS
from ..types import MoeLayer
from .memory import PER_NEURON, is_judged_jointly, widths_to_select
from .workload import Workload

TRIED_RIDGES = 3  # the one in the middle and what is beside the best one, typically
CONJUGATE_STEPS = 12  # of `refit_by_passes` until it stops, typically
ELIMINATION = 2.4  # I^3 operations of removing neurons in blocks: inverse, updates, factorization
SVD = 20  # O I min(O, I) operations of a singular value decomposition


@dataclass(frozen=True)
class Operations:
    """Sums of operations by the precision of the products, and assignments of neurons in units of 256 neurons."""

    of_model: float = 0.0  # in the model's dtype
    float32: float = 0.0
    float64: float = 0.0
    assignments: float = 0.0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(
            self.of_model + other.of_model,
            self.float32 + other.float32,
            self.float64 + other.float64,
            self.assignments + other.assignments,
        )

    def times(self, factor: float) -> "Operations":
        """All of them so often."""
        return Operations(*(factor * value for value in vars(self).values()))

    @property
    def flops(self) -> float:
        """Of all precisions together; assignments are none."""
        return self.of_model + self.float32 + self.float64


@torch.no_grad()
def forward_flops(model: PreTrainedModel, rows: int, tokens: int, *, logits: int = 1) -> int:
    """Of one forward over `rows` rows of `tokens` tokens: exact for what is a matrix product or attention.

    Counted by running the model without weights, on the meta device; routed experts are added by their sizes.

    Args:
        model: On any device.
        rows: B.
        tokens: S.
        logits: Of how many tokens of each row the logits are computed, from the last one; 0 for all.

    Raises:
        ValueError: The model cannot be run without weights.
    """
    skeleton = empty_model(model.config)
    layers = find_layers(skeleton)
    for layer in layers:
        layer.experts.forward = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    try:
        with FlopCounterMode(display=False) as counter:
            # Without a cache the mask is made from values of the positions, which are not there.
            skeleton(input_ids=ids, use_cache=True, logits_to_keep=logits)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"The operations of {type(model).__name__} cannot be counted without running it ({type(error).__name__}: "
            f"{str(error)[:120]}). The sizes of the result are known all the same."
        ) from error
    return counter.get_total_flops() + sum(routed_flops(layer, rows * tokens) for layer in layers)


def routed_flops(layer: MoeLayer, tokens: int) -> int:
    """Of the chosen experts on so many tokens, 2 T k E."""
    return 2 * tokens * layer.top_k * expert_size(layer).matrix_entries


def calibration_operations(model: PreTrainedModel, work: Workload, *, logits: int = 1) -> Operations:
    """Of one forward over all calibration rows; `logits` as for `forward_flops`."""
    of_rows = {rows: forward_flops(model, rows, work.sequence_length, logits=logits) for rows in set(work.batches)}
    return Operations(of_model=sum(count * of_rows[rows] for rows, count in work.batches.items()))


def statistics_operations(layer: MoeLayer, recipe: Recipe, work: Workload) -> Operations:
    """Of what the statistics of a layer need beside the forward, whose experts they run again in float32."""
    names, tokens = wanted_by(recipe).statistics, work.num_tokens
    size, slots = expert_size(layer).matrix_entries, layer.num_slots
    plain = [name for name in names if not STATISTICS.trait(name, "gradients", False)]
    kinds = [STATISTICS.trait(name, "of") for name in plain]
    of_expert = {name for name in plain if STATISTICS.trait(name, "of") == "expert"}
    inner = 1 - layer.intermediate_size * layer.hidden_size / size  # without the last matrix
    runs = 0 if not of_expert else inner if of_expert <= set(PER_NEURON) else 1
    runs += kinds.count("experts") + ("choices" in kinds)
    total = Operations(float32=runs * routed_flops(layer, tokens))
    if recipe.statistics_with("gradients"):
        total += Operations(float32=routed_flops(layer, min(recipe.gradient_tokens, tokens)))
    if "every_expert" in kinds:
        total += Operations(float32=2 * min(recipe.every_expert_tokens, tokens) * slots * size)
    if "output_cosine_sum" in names:
        total += Operations(float32=2 * min(recipe.every_expert_tokens, tokens) * slots**2 * layer.hidden_size)
    if "logit_gram" in names:
        total += Operations(float64=2 * tokens * slots**2)
    if "chosen_gram" in names:
        total += Operations(float32=2 * tokens * layer.top_k**2 * layer.hidden_size)
    return total


def step_operations(layer: MoeLayer, recipe: Recipe, num_experts: int, work: Workload) -> Operations:
    """Of what usually dominates the compression of one layer: judging, aligning, selecting, refitting, decomposing."""
    slots, width, hidden = layer.num_slots, layer.intermediate_size, layer.hidden_size
    entries = expert_size(layer).matrix_entries
    held_out = min(FIT_HELD_OUT_TOKENS if recipe.needs_inputs else HELD_OUT_TOKENS, work.num_held_out_tokens)
    total = Operations(of_model=2 * routed_flops(layer, held_out))
    if recipe.aligns:
        members = slots - num_experts
        total += Operations(float32=2 * members * width * entries, assignments=members * (width / 256) ** 2.5)
    if recipe.needs_inputs:
        total += fit_operations(layer, recipe, num_experts, min(recipe.fit_tokens, work.num_tokens), held_out)
    if recipe.allots_neurons:
        total += curve_operations(layer, min(recipe.fit_tokens, work.num_tokens))
    if recipe.decomposes(slots):
        matrices = entries / (width * hidden)
        total += Operations(float32=SVD * num_experts * matrices * width * hidden * min(width, hidden))
    return total


def curve_operations(layer: MoeLayer, tokens: int) -> Operations:
    """Of taking a layer apart neuron by neuron, on so many kept tokens."""
    width, hidden, slots, chosen = layer.intermediate_size, layer.hidden_size, layer.num_slots, layer.top_k
    inner = expert_size(layer).matrix_entries / width - hidden
    features = routed_flops(layer, tokens) + 2 * tokens * chosen * width * (inner + width)
    if slots * width <= MOST_JOINT_NEURONS:
        return Operations(float32=features) + joint_operations(slots * width, 0, hidden, chosen * width, tokens)
    return Operations(float32=features, float64=slots * width * (ELIMINATION * width**2 + width * hidden))


def joint_operations(before: int, after: int, hidden: int, reached: float, tokens: int) -> Operations:
    """Of judging the neurons of all experts together: their sums, the inverse, and its updates until `after` stay.

    Args:
        before: P, neurons.
        after: Those that stay.
        hidden: D.
        reached: Neurons that a token reaches.
        tokens: T.
    """
    sums = tokens * (reached**2 + 2 * reached * hidden)
    updates = 2 * (before**3 - after**3) / 3 + hidden * (before**2 - after**2)
    return Operations(float32=sums, float64=before**3 + 4 * before**2 * hidden + updates)


def fit_operations(layer: MoeLayer, recipe: Recipe, num_experts: int, tokens: int, held_out: int) -> Operations:
    """Of what is fitted on kept tokens: outputs, Grams of neurons, the order of removal, least squares."""
    original, hidden, chosen = layer.intermediate_size, layer.hidden_size, min(layer.top_k, num_experts)
    entries = expert_size(layer).matrix_entries
    inner = entries / original - hidden  # of one neuron in the matrices before the activation
    has_outputs = gives_routed_output(layer) and not recipe.sequential
    total = Operations(float32=0 if has_outputs else routed_flops(layer, tokens + held_out))
    neurons = recipe.neurons_per_layer(layer.num_slots, original, num_experts)
    width, part = widths_to_select(layer, recipe, num_experts)
    share = neurons / (num_experts * width)
    if recipe.selection is not None and share < 1:
        features = 2 * tokens * chosen * width * (inner + part)
        removal = num_experts * width * (ELIMINATION * part**2 + part * hidden)
        total += Operations(float32=features + removal, float64=num_experts * width * part**2)
        if is_judged_jointly(recipe, num_experts * width):
            total += joint_operations(int(num_experts * width), neurons, hidden, chosen * width, tokens)
    if recipe.refit is None:
        return total
    shared = shared_width(layer, recipe)
    neurons += shared
    kept = chosen * width * share + shared  # neurons that a token reaches
    features = 2 * (tokens + held_out) * (chosen * width * share * inner + shared / original * entries)
    if neurons <= MOST_JOINT_NEURONS:
        sums = (tokens + held_out) * (kept**2 + 2 * kept * hidden)
        tries = TRIED_RIDGES * (neurons**3 / 3 + 2 * neurons**2 * min(hidden, JUDGED_COLUMNS))
        solves = tries + 4 * neurons**2 * hidden
        return total + Operations(float32=features + sums, float64=solves)
    one_pass = features + 4 * tokens * kept * hidden
    solves = CONJUGATE_STEPS * 2 * (num_experts * (width * share) ** 2 + shared**2) * hidden
    grams = 2 * tokens * (chosen * (width * share) ** 2 + shared**2)
    return total + Operations(float32=CONJUGATE_STEPS * one_pass + grams, float64=solves)
