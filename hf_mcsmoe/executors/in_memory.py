"""Statistics of all layers from one forward over the calibration data, the whole model in place."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import Calibration, CalibrationBatch
from ..families import forward_call, reading_part
from ..families.residual import ResidualStream
from ..modeling.offload import execution_device
from ..observation.layer_inputs import LayerInputs, tokens_of_batch
from ..statistics import STATISTICS
from ..types import LayerStatistics, MoeLayer
from .decoder_inputs import decoder_modules, with_decoder_inputs
from .gradients import batches_with_backward, check_gradients, check_in_memory, differentiable, graph_bytes, loss_of
from .observer import LayerObserver, announce, join_tied
from .processes import current
from .sharing import BatchOrder
from .stream_outputs import watched_stream

HELD_OUT_TOKENS = 512  # per layer: (D + k) numbers each
FIT_HELD_OUT_TOKENS = 4096  # where they choose a ridge and judge a refit, too


@dataclass(frozen=True, eq=False)
class Collected:
    """What a forward over the calibration data left of one layer."""

    statistics: LayerStatistics | None  # None: no token reached the layer
    held_out: LayerInputs
    calibration: LayerInputs  # empty unless tokens were asked for


def collect_statistics(
    model: PreTrainedModel, layers: list[MoeLayer], calibration: Calibration, needs: frozenset[str], **options: Any
) -> tuple[dict[str, LayerStatistics], dict[str, LayerInputs]]:
    """Statistics by the name of the layer, without those that no token reached, and held-out samples; see `collect`.

    Raises:
        ValueError: No layer saw a token, or the sums of one are NaN or Inf.
    """
    collected = collect(model, layers, calibration, needs, **options)
    return reached(collected), {name: one.held_out for name, one in collected.items()}


def reached(collected: dict[str, Collected]) -> dict[str, LayerStatistics]:
    """The statistics of the layers that a token reached."""
    return {name: one.statistics for name, one in collected.items() if one.statistics is not None}


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    calibration: Calibration,
    needs: frozenset[str],
    *,
    seed: int = 0,
    progress: bool = True,
    forward: Callable[[int, dict[str, Any]], Any] | None = None,
    held_out_tokens: int = HELD_OUT_TOKENS,
    calibration_tokens: int = 0,
    every_expert_tokens: int = 0,
    gradient_tokens: int | None = None,
    refuse_unreached: bool = True,
    keeps_streams: bool = False,
    keeps_inputs: bool = True,
    keeps_outputs: bool = False,
) -> dict[str, Collected]:
    """Run the model once over the calibration data.

    Where several processes work together each runs a part of the batches. All of them get the statistics of one
    process, up to the order of the sums, and each layer's kept tokens go to the process that owns it, see `Processes`.

    An encoder-decoder also needs target tokens: see `with_decoder_inputs`. Padding of either side does not count.

    Args:
        model: In any device map; its mode is restored.
        layers: The layers to watch.
        calibration: Batches; held-out ones only give the samples.
        needs: Names in `STATISTICS`.
        seed: Which tokens are sampled.
        progress: Show a progress bar.
        forward: Runs what is to be watched, given the position of a batch and the model's arguments; None runs
            the model.
        held_out_tokens: About how many held-out tokens to keep the inputs of.
        calibration_tokens: About how many of the others.
        every_expert_tokens: About how many tokens all experts are run on, for the statistics that ask for that.
        gradient_tokens: About how many tokens run backward too, for the statistics of gradients; None for all.
        refuse_unreached: Whether it is an error that no token reached any of `layers`, which may be a few of many.
        keeps_streams: Keep the residual stream after each layer for the same tokens.
        keeps_inputs: Keep the inputs.
        keeps_outputs: Keep what the experts gave for the same tokens, where their module gives nothing else.

    Returns:
        By the name of the layer. Memory: that of the statistics, and D + k numbers for each token that is kept, twice
        D where the router is called with hidden states.

    Raises:
        ValueError: No layer saw a token and that is refused, or the sums of one are NaN or Inf.
    """
    of_gradients = sorted(name for name in needs if STATISTICS.trait(name, "gradients", False))
    if of_gradients:
        check_gradients(model, layers, of_gradients)
        check_in_memory(model)
    in_decoder = decoder_modules(model)
    observers = [LayerObserver(layer, needs, layer.experts in in_decoder) for layer in layers]
    # One for each kind of draw: which tokens go to every expert must not depend on how many others are kept.
    generators = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    num_held_out = sum(batch.held_out for batch in calibration.batches)
    num_others = len(calibration.batches) - num_held_out
    # By whether a batch is held out.
    limit_of = tokens_of_batch(calibration_tokens, num_others), tokens_of_batch(held_out_tokens, num_held_out)
    everywhere = tokens_of_batch(every_expert_tokens, num_others)
    was_training = model.training
    backward = batches_with_backward(calibration, gradient_tokens) if of_gradients else frozenset()
    processes, order = current(), BatchOrder(observers)
    model.eval()
    try:
        with ExitStack() as stack:
            for observer in observers:
                if observer.accumulator.reads_residual:
                    observer.residual = ResidualStream(model, observer.layer)
                    stack.enter_context(observer.residual.attached())
                observer.keeps_inputs, observer.keeps_outputs = keeps_inputs, keeps_outputs
                stack.enter_context(observer.attached())
                if keeps_streams:
                    stack.enter_context(watched_stream(model, observer.layer, observer.keep_stream))
            if of_gradients:
                stack.enter_context(differentiable(model, graph_bytes(model, layers, calibration)))
            bar = tqdm(calibration.batches, desc="calibrating", unit="batch", disable=not progress, delay=2)
            for position, batch in enumerate(bar):
                batch = with_decoder_inputs(batch, model)
                announce(observers, batch, limit_of[batch.held_out], everywhere, generators, input_device(model))
                if not processes.takes(position):
                    continue  # the draws before it were made, so that every process draws alike
                run_batch(model, batch, observers, position, forward, with_backward=position in backward)
                order.note(position)
    finally:
        model.train(was_training)
    order.share(processes)
    observers = join_tied(observers)
    if refuse_unreached and observers and not any(o.accumulator.num_tokens for o in observers):
        observers[0].accumulator.finish(observers[0].layer.name)  # raises
    return {
        o.layer.name: Collected(
            o.accumulator.finish(o.layer.name) if o.accumulator.num_tokens else None, o.held_out, o.calibration
        )
        for o in observers
    }


def run_batch(
    model: PreTrainedModel,
    batch: CalibrationBatch,
    observers: list[LayerObserver],
    position: int,
    forward: Callable[[int, dict[str, Any]], Any] | None,
    *,
    with_backward: bool,
) -> None:
    """A forward of one batch, and a backward if it is to have one; arguments as for `collect`."""
    inputs = {name: to_device(value, input_device(model)) for name, value in batch.inputs.items()}
    called, inputs = forward_call(model, inputs)
    inputs |= cheap_forward(called)
    for observer in observers:
        observer.has_backward = with_backward
    if with_backward:
        run_backward(called, inputs, batch, observers)
    elif forward is None:
        called(**inputs)
    else:
        forward(position, inputs)


def run_backward(
    called: nn.Module, inputs: dict[str, Any], batch: CalibrationBatch, observers: list[LayerObserver]
) -> None:
    """A forward that observers watch, and a backward in which they only note gradients.

    Memory: the inputs of all decoder layers, the graph of one or of as many as fit in `GRAPH_BYTES`, the logits of the
    batch, and 2 D numbers for each of its tokens and MoE layers.
    """
    with torch.enable_grad():
        loss = loss_of(called, inputs, batch.token_mask)
        for observer in observers:
            observer.is_deaf = True
        try:
            loss.backward()
        finally:
            for observer in observers:
                observer.is_deaf = False
    for observer in observers:
        observer.add_gradients()


def cheap_forward(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that spare the parts of a forward that calibration does not look at: cache and most logits."""
    parameters = inspect.signature(type(model).forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in parameters}


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model expects its inputs."""
    return execution_device(reading_part(model).get_input_embeddings())


def to_device(value: Any, device: torch.device) -> Any:
    """`value` on `device` if it is a tensor."""
    return value.to(device) if isinstance(value, Tensor) else value
