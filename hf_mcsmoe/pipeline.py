"""The steps of a recipe on a whole model in memory: statistics, budgets, then layer after layer."""

import dataclasses
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .allocation import ALLOCATION
from .calibration import Calibration
from .executors.in_memory import Collected, reached
from .executors.kept_inputs import collect_first, original_visits, visits
from .executors.processes import current
from .executors.sharing import Result, compress_shared
from .executors.wanted import Wanted, wanted_by
from .families import find_layers, tied_layers
from .layer.compression import compress_layer, follow
from .layer.protection import check_room, protected_experts, with_protected
from .layouts import budget_of_layer, native_target, resolve_layers
from .modeling.offload import fetched
from .neuron_allocation import allot_neurons
from .outcome import conclude, count
from .recipe import STEPS, Recipe
from .saliency import SALIENCY
from .saved_statistics import SavedStatistics
from .sizes import measure
from .types import CompressionReport, LayerReport, LayerStatistics, MoeLayer

logger = logging.get_logger(__name__)


def compress_in_memory(
    model: PreTrainedModel,
    recipe: Recipe,
    data: Calibration | SavedStatistics,
    *,
    progress: bool,
    start: float,
    collected: Mapping[str, Collected] | None = None,
) -> CompressionReport:
    """Statistics in one pass, then each layer in order. `model` was checked; it is changed in place.

    Args:
        model: The original.
        recipe: What to do.
        data: What to calibrate on, or what calibration left.
        progress: Show progress bars.
        start: `time.perf_counter()` when the work began.
        collected: What calibration left in memory, with all that the recipe needs; not for a sequential recipe.
    """
    found = find_layers(model)
    layers, excluded = resolve_layers(found, recipe)
    first_of_tied = tied_layers(found)
    tied = {layer: first for layer in found if (first := first_of_tied.get(layer.name)) in layers}
    before, active = count(model), measure(model, found).active_parameters
    check_finite(layers)
    wanted = wanted_by(recipe)
    if isinstance(data, SavedStatistics):
        collected = data
    is_collected = collected is not None
    processes = current()
    processes.share_layers([layer.name for layer in layers], {layer.name: x.name for layer, x in tied.items()})
    collected = collected if is_collected else collect_first(model, layers, tied, data, wanted, progress)
    statistics = data.statistics() if isinstance(data, SavedStatistics) else reached(collected)
    layers, warnings = leave_unreached(layers, statistics, recipe)
    protected = protected_experts(recipe, {layer.name: statistics[layer.name] for layer in layers})
    allotted = dict(
        zip([layer.name for layer in layers], allocate(layers, recipe, statistics, protected), strict=True)
    )
    allotted, protected = processes.from_first((allotted, protected))
    check_room(recipe, allotted, protected)
    given, todo = looks_at_layers(model, layers, tied, recipe, data, wanted, collected, is_collected=is_collected)
    neurons = allot_neurons(layers, recipe, statistics, given, processes, progress=progress)
    native = native_target(model, recipe, layers, excluded) if recipe.layout == "native" else None
    reports: dict[str, LayerReport] = {}
    layouts: dict[str, Any] = {}
    statistics_kept: dict[str, Tensor] = {}

    def compress(layer: MoeLayer, of_layer: Collected) -> Result:
        budget = allotted[layer.name], protected.get(layer.name), neurons.get(layer.name)
        return compress_layer(layer, recipe, of_layer, *budget)

    todo = tqdm(todo, "merging", len(layers), unit="layer", disable=not progress, delay=2)
    how = {"one_by_one": recipe.sequential or bool(tied), "is_native": recipe.layout == "native"}
    for layer, (report, layout, recorded) in compress_shared(todo, compress, processes, **how):
        statistics_kept |= recorded
        reports[layer.name], layouts[layer.name] = report, layout
        for other in [other for other, first in tied.items() if first is layer]:
            follow(other, layer, report, layout, recipe)
            layouts[other.name] = layout
    if tied:
        model.tie_weights()
    layouts = {layer.name: layouts[layer.name] for layer in found if layer.name in layouts}
    in_order = [reports[layer.name] for layer in layers]
    how = {"native": native, "before": before, "active_before": active, "start": start, "warnings": warnings}
    how |= {"used_again": [first.name for first in tied.values()], "statistics": statistics_kept}
    conclude(model, recipe, data, layers, in_order, layouts, **how)
    return model.compression_report


def looks_at_layers(
    model: PreTrainedModel,
    layers: list[MoeLayer],
    tied: Mapping[MoeLayer, MoeLayer],
    recipe: Recipe,
    data: Calibration | SavedStatistics,
    wanted: Wanted,
    collected: Mapping[str, Collected],
    *,
    is_collected: bool,
) -> tuple[Iterator[tuple[MoeLayer, Collected]], Iterator[tuple[MoeLayer, Collected]]]:
    """Each layer with what it is given in the original model, and each with what it is compressed on, when asked."""
    if is_collected:
        return tuple(((layer, collected[layer.name]) for layer in layers) for _ in range(2))
    # What budgets depend on is of the original layers, in one pass; later ones need not collect it again.
    of_steps = recipe.statistics_needed([step for step in STEPS if step != "allocation"])
    how = dataclasses.replace(wanted, statistics=of_steps), collected
    return original_visits(model, layers, data, *how), visits(model, layers, tied, data, *how)


def allocate(
    layers: list[MoeLayer], recipe: Recipe, statistics: dict[str, LayerStatistics], protected: dict[str, Tensor]
) -> list[int]:
    """Experts that each layer keeps, by the recipe's allocation rule; protected ones come first in all of them."""
    if recipe.allots_neurons:
        return budget_of_layer(layers, recipe)  # all experts stay
    saliency_of_layer = [
        with_protected(saliency_of(layer, recipe, statistics[layer.name]), protected.get(layer.name))
        for layer in layers
    ]
    supply = {"statistics_of_layer": lambda: [statistics[layer.name] for layer in layers], "seed": lambda: recipe.seed}
    how = {"options": recipe.allocation_options, "supply": supply}
    return ALLOCATION.call(recipe.allocation, saliency_of_layer, budget_of_layer(layers, recipe), **how)


def saliency_of(layer: MoeLayer, recipe: Recipe, statistics: LayerStatistics) -> Tensor:
    """The recipe's saliency of each expert of a layer, (N,)."""
    with fetched(layer.experts):
        weights = None
        if "weights" in SALIENCY.needs(recipe.saliency):
            weights = layer.family.view(layer, layer.family.stack(layer, layer.expert_parameters))
        return SALIENCY[recipe.saliency](statistics, weights, **recipe.saliency_options)


def leave_unreached(
    layers: list[MoeLayer], statistics: Container[str], recipe: Recipe
) -> tuple[list[MoeLayer], list[str]]:
    """The layers that calibration reached, and what to warn of: those for images see no token of a text.

    Args:
        layers: Those to compress.
        statistics: What is asked for is only which layers it has.
        recipe: Of the compression.

    Raises:
        ValueError: There are others, and the layout is native, where one M holds for all; or no layer was reached.
    """
    names = [layer.name for layer in layers if layer.name not in statistics]
    if not names:
        return layers, []
    if len(names) == len(layers):
        raise ValueError(
            f"No calibration token reached {names[0]!r}{' or a later layer' if len(names) > 1 else ''}. "
            "Give text that uses it, or leave it out with exclude_layers."
        )
    listed = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if recipe.layout == "native":
        raise ValueError(
            f"No calibration token reached {listed}. Give calibration data that uses them (images for vision "
            "experts), leave them out with exclude_layers, or use layout='mapped', which leaves them as they are."
        )
    message = f"No calibration token reached {listed}: left as they are. Give calibration data that uses them."
    logger.warning(message)
    return [layer for layer in layers if layer.name in statistics], [message]


def check_finite(layers: list[MoeLayer]) -> None:
    """Raise ValueError for NaN or Inf in the experts of a layer, naming layer and expert."""
    for layer in layers:
        with fetched(layer.experts):
            for name, parameter in layer.family.stack(layer, layer.expert_parameters).items():
                rows = parameter.detach().flatten(1)
                # Extremes pass NaN on, and take a tenth of the time and no memory beside isfinite of everything.
                finite = torch.isfinite(rows.amax(dim=1)) & torch.isfinite(rows.amin(dim=1))
                if not finite.all():
                    bad = (~finite).nonzero().flatten().tolist()
                    raise ValueError(
                        f"{name} of {layer.name!r} holds NaN or Inf in expert {bad}. "
                        "The checkpoint is damaged or was saved in a dtype too narrow for it; get a sound copy."
                    )
