"""Time, memory, operations and bytes of compressing a model, for both executors, from sizes alone."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..auto_candidates import recipe_to_plan
from ..executors.decoder_stack import stack_name
from ..executors.kept_inputs import fits_at_once, groups_of_layers
from ..executors.shards import NotStreamableError
from ..executors.streaming_choice import reason_against_recipe
from ..executors.streaming_passes import plan_passes
from ..executors.wanted import wanted_by
from ..families import find_layers
from ..fitting import resolve_fit
from ..layouts import budget_of_layer, check_layout, resolve_layers
from ..planning import plan
from ..recipe import Recipe
from ..sizes import stored_tensors
from ..types import MoeLayer
from .machine import MachineRates
from .memory import Memory, batch_bytes, kept_bytes, layer_work_bytes, statistics_bytes
from .operations import Operations, calibration_operations, statistics_operations, step_operations
from .workload import Workload

HIDDEN_STATES_BYTES = 2**30  # as `compress_moe` has it
FLOAT64 = 0.5  # of the rate of float32
BACKWARD = 2  # forwards that a backward costs which only notes gradients: layers run again, gradients of inputs


@dataclass(frozen=True)
class Estimate:
    """What one executor will need; an estimate, but for the bytes of weights."""

    executor: str
    passes: int  # over the calibration data, of the whole model or layer by layer
    bytes_read: int
    bytes_written: int
    calibration_flops: float
    statistics_flops: float
    steps_flops: float
    memory: Memory
    seconds: float | None  # None: no rates were given
    impossible: str | None = None  # why the executor cannot be used

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**vars(self), "memory": self.memory.to_dict()}


def estimate(
    model: PreTrainedModel, recipe: Recipe, work: Workload | None = None, rates: MachineRates | None = None
) -> dict[str, Estimate]:
    """What compressing a model as a recipe says will need with each executor, "in_memory" and "streaming".

    Bytes are those of tensors: weights, and with streaming hidden states and statistics; headers and the report are
    left out. FLOPs are those of matrix products: exact for a forward, the dominant terms of the
    steps; the training of `matching` and searches over subsets are not in here. Seconds are FLOPs and bytes over
    rates: right within a factor of two where products dominate.

    Args:
        model: The original, on any device; the meta device is enough.
        recipe: What is asked.
        work: The calibration data; None for the default of text.
        rates: Of the machine.

    Raises:
        ValueError: The recipe cannot be planned for the model, or its operations cannot be counted.
    """
    work = work or Workload()
    recipe, _ = resolve_fit(model, recipe)
    found = find_layers(model)
    recipe = recipe_to_plan(recipe, lambda candidate: check_layout(found, candidate, model=model))
    layers, _ = resolve_layers(found, recipe)
    num_experts = dict(zip((x.name for x in layers), budget_of_layer(layers, recipe), strict=True))
    steps = sum((step_operations(x, recipe, num_experts[x.name], work) for x in layers), Operations())
    of_layers = sum((statistics_operations(x, recipe, work) for x in layers), Operations())
    of_gradients = recipe.statistics_with("gradients")
    forward = calibration_operations(model, work, logits=0 if of_gradients else 1)
    if of_gradients:
        forward = forward + forward.times(BACKWARD * min(recipe.gradient_tokens, work.num_tokens) / work.all_tokens)
    sizes = plan(model, recipe)
    written = sizes.total_bytes_after
    passes = passes_in_memory(layers, recipe, work)
    # A sequential recipe runs all layers but the last once more after they are compressed: `ContinuedForwards`.
    whole = passes - 1 / len(layers) if recipe.sequential else passes
    how = {"work": work, "recipe": recipe, "rates": rates, "steps": steps}
    in_memory = Estimate(
        "in_memory",
        passes,
        sizes.total_bytes_before,
        written,
        forward.flops * whole,
        (2 if recipe.sequential else 1) * of_layers.flops,
        steps.flops,
        memory_of_loaded(model, layers, num_experts, sizes.total_bytes_before, recipe, work),
        seconds(forward.times(whole) + of_layers + steps, sizes.total_bytes_before, written, rates),
    )
    return {
        "in_memory": in_memory,
        "streaming": streaming(model, found, layers, num_experts, of_layers, written, **how),
    }


def passes_in_memory(layers: list[MoeLayer], recipe: Recipe, work: Workload) -> int:
    """Forwards over the calibration data."""
    wanted, beforehand = wanted_by(recipe), forwards_beforehand(layers, recipe, work)
    if recipe.sequential:  # at first, to be looked at again, and compressed
        return beforehand + 3
    return beforehand + (1 if fits_at_once(layers, work, wanted) else 1 + len(groups_of_layers(layers, work, wanted)))


def forwards_beforehand(layers: list[MoeLayer], recipe: Recipe, work: Workload) -> int:
    """Those of them for what an allocation measures of all layers of the original model."""
    wanted = wanted_by(recipe)
    if not recipe.allots_neurons or (wanted.targets is None and fits_at_once(layers, work, wanted)):
        return 0
    return len(groups_of_layers(layers, work, dataclasses.replace(wanted, sequential=False)))


def streaming(
    model: PreTrainedModel,
    found: list[MoeLayer],
    layers: list[MoeLayer],
    num_experts: Mapping[str, int],
    of_layers: Operations,
    written: int,
    *,
    work: Workload,
    recipe: Recipe,
    rates: MachineRates | None,
    steps: Operations,
) -> Estimate:
    """The estimate of the streaming executor, with the reason where it is impossible."""
    impossible = not_streamable(model, found, recipe)
    passes = plan_passes(recipe, layers, work, keeps_tokens=True)
    forwards = passes.forwards(recipe)
    stack, in_stack, rest = stack_bytes(model, layers) if impossible is None else (set(), [], 0)
    last = last_moe(layers, stack)
    states = 0 if not in_stack else last * work.all_tokens * hidden_bytes(model)
    read = rest + sum(in_stack) + (sum(in_stack[: last + 1]) if passes.has_first else 0)
    forward = calibration_operations(model, work).times(forwards)
    memory = memory_of_streamed(model, layers, num_experts, in_stack, rest, recipe, work)
    total = forward + of_layers.times(forwards) + steps
    written += (passes.runs_data_first + passes.runs_data_last * (1 if recipe.targets is None else 2)) * states
    if passes.has_first:  # what the first pass leaves for the second one
        written += sum(statistics_bytes(x, recipe) + kept_bytes([x], recipe, work) for x in layers)
    time = seconds(total, read, written, rates)
    flops = forward.flops, forwards * of_layers.flops, steps.flops
    return Estimate("streaming", forwards, read, written, *flops, memory, time, impossible)


def not_streamable(model: PreTrainedModel, layers: list[MoeLayer], recipe: Recipe) -> str | None:
    """Why a model or a recipe cannot be streamed, as far as can be told without running it."""
    reason = reason_against_recipe(recipe)
    if reason is not None:
        return reason
    try:
        stack_name(model, [layer.name for layer in layers])
    except NotStreamableError as reason:
        return str(reason)
    return None


def stack_bytes(model: PreTrainedModel, layers: list[MoeLayer]) -> tuple[set[str], list[int], int]:
    """(names of the decoder layers, bytes of each, bytes of everything else)."""
    name = stack_name(model, [layer.name for layer in layers])
    prefixes = [f"{name}.{index}." for index in range(len(model.get_submodule(name)))]
    of_layer = dict.fromkeys(prefixes, 0)
    rest = 0
    for names, tensor in stored_tensors(model):
        size = tensor.numel() * tensor.element_size()
        place = next((prefix for prefix in prefixes if any(one.startswith(prefix) for one in names)), None)
        if place is None:
            rest += size
        else:
            of_layer[place] += size
    return set(prefixes), list(of_layer.values()), rest


def last_moe(layers: list[MoeLayer], prefixes: set[str]) -> int:
    """Position of the last decoder layer that has experts to compress; 0 where there are no decoder layers."""
    found = [prefix for prefix in prefixes if any(f"{layer.name}.".startswith(prefix) for layer in layers)]
    return max((int(prefix.rstrip(".").rpartition(".")[2]) for prefix in found), default=0)


def hidden_bytes(model: PreTrainedModel) -> int:
    """Of the hidden state of one token."""
    return model.config.get_text_config().hidden_size * model.dtype.itemsize


def memory_of_loaded(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    num_experts: Mapping[str, int],
    weights: int,
    recipe: Recipe,
    work: Workload,
) -> Memory:
    """Of the executor that holds the model."""
    return Memory(
        weights=weights,
        hidden_states=work.all_tokens * hidden_bytes(model) if recipe.sequential else 0,
        statistics=sum(statistics_bytes(layer, recipe) for layer in layers),
        kept_tokens=kept_bytes(layers, recipe, work),
        activations=batch_bytes(model, layers, recipe, work),
        layer_work=max(layer_work_bytes(layer, recipe, num_experts[layer.name], work) for layer in layers),
    )


def memory_of_streamed(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    num_experts: Mapping[str, int],
    in_stack: list[int],
    rest: int,
    recipe: Recipe,
    work: Workload,
) -> Memory:
    """Of the executor that holds one decoder layer: fused from experts stored one by one, and as it becomes."""
    states = min(HIDDEN_STATES_BYTES, work.all_tokens * hidden_bytes(model))
    states *= 1 if recipe.targets is None else 2  # those of the original layers, too
    return Memory(
        weights=rest + 2 * max(in_stack, default=0),  # the next one is read ahead
        hidden_states=states,
        statistics=max(statistics_bytes(layer, recipe) for layer in layers),
        kept_tokens=max(kept_bytes([layer], recipe, work) for layer in layers),
        activations=batch_bytes(model, layers, recipe, work),
        layer_work=max(
            max(layer_work_bytes(layer, recipe, num_experts[layer.name], work), max(p.nbytes for p in parameters))
            for layer in layers
            if (parameters := layer.expert_parameters.values())
        ),
    )


def seconds(operations: Operations, read: int, written: int, rates: MachineRates | None) -> float | None:
    """That they take at these rates, one after another."""
    if rates is None:
        return None
    products = operations.of_model / rates.flops + operations.float32 / rates.flops_float32
    products += operations.float64 / (FLOAT64 * rates.flops_float32)
    disk = read / rates.read_bytes + written / rates.write_bytes
    return products + operations.assignments * rates.assignment_seconds + disk
