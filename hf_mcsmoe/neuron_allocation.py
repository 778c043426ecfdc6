"""One budget of neurons for all layers, spent by what their removal was measured to cost."""

from collections.abc import Iterable, Mapping

from tqdm.auto import tqdm

from .allocation import ALLOCATION
from .executors.in_memory import Collected
from .executors.processes import Processes
from .layer.removal import RULE, LayerNeurons, RemovalCurve, removal_curve
from .layouts import neurons_of_layer
from .recipe import Recipe
from .types import LayerStatistics, MoeLayer


def allot_neurons(
    layers: list[MoeLayer],
    recipe: Recipe,
    statistics: Mapping[str, LayerStatistics],
    given: Iterable[tuple[MoeLayer, Collected]],
    processes: Processes,
    *,
    progress: bool,
) -> dict[str, LayerNeurons]:
    """Neurons that each layer keeps, by its name; together exactly as many as if all kept the recipe's share.

    Where several processes work together each measures the layers whose tokens it has, and all get the same numbers.

    Args:
        layers: Those that are compressed, as found.
        recipe: Of the compression.
        statistics: Of these layers.
        given: Each of them with its kept tokens, of the original model; not asked where all neurons stay.
        processes: Those that work on the model.
        progress: Show a progress bar.

    Returns:
        Empty where the recipe's allocation is not of neurons, or all of them stay.
    """
    if not recipe.allots_neurons:
        return {}
    shares = {layer.name: neurons_of_layer(layer, recipe, layer.num_slots) for layer in layers}
    if all(shares[layer.name] == layer.num_slots * layer.intermediate_size for layer in layers):
        return {}
    min_share = (ALLOCATION.options(recipe.allocation) | recipe.allocation_options)["min_share"]
    curves: dict[str, RemovalCurve] = {}
    for layer, tokens in tqdm(given, "measuring", len(layers), unit="layer", disable=not progress, delay=2):
        if processes.owns(layer.name):
            least = max(1, int(min_share * shares[layer.name]))
            curves[layer.name] = removal_curve(layer, recipe, tokens, least)
    measured = processes.gather({name: curve.costs for name, curve in curves.items()})
    costs = {name: of_layer for of_process in measured for name, of_layer in of_process.items()}
    names = [layer.name for layer in layers]
    supply = {"statistics_of_layer": lambda: [statistics[name] for name in names]}
    how = {"options": recipe.allocation_options, "supply": supply}
    ordered = [costs[name] for name in names], [shares[name] for name in names]
    numbers = processes.from_first(ALLOCATION.call(recipe.allocation, *ordered, **how))
    # A sequential recipe selects on other tokens, those that the compressed layers before it give.
    is_known = recipe.selection == RULE and not recipe.sequential
    return {
        name: LayerNeurons(number, curves[name].saliency if is_known and name in curves else None)
        for name, number in zip(names, numbers, strict=True)
    }
