"""compare_methods: many recipes on one model, from one calibration, judged on the same text."""

import copy
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import has_offloaded_params
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .auto_candidates import AUTO
from .calibration import Calibration
from .evaluation import Evaluation, evaluate_model
from .evaluation.baseline_logits import BaselineLogits
from .executors.in_memory import Collected
from .executors.kept_inputs import collect_first, fits_at_once
from .executors.wanted import Wanted, wanted_by, wanted_by_all
from .families import find_layers, tied_layers
from .fitting import resolve_fit
from .layouts import check_layout
from .method_table import layouts_of
from .pipeline import compress_in_memory
from .planning import plan
from .recipe import Recipe
from .recipe_reading import recipe_from_preset


@dataclass(frozen=True)
class ComparedResult:
    """One recipe at one size, and what it did to the model; plain values, ready for JSON."""

    method: str
    layout: str
    keep: float
    recipe: dict[str, Any]
    seconds: float | None = None  # of compressing; the shared calibration is not in here
    expert_bytes: int | None = None
    total_bytes: int | None = None
    active_parameters: int | None = None
    evaluation: dict[str, Any] | None = None  # of `Evaluation`, with the original as the baseline
    relative_error: float | None = None  # mean over the layers, on held-out calibration tokens
    skipped: str | None = None  # why there is no result

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return asdict(self)

    @property
    def loss_increase(self) -> float | None:
        """Nats per token over the original; None where it was skipped."""
        if self.evaluation is None:
            return None
        return self.evaluation["overall"]["loss"] - self.evaluation["overall"]["baseline_loss"]


def recipes_to_compare(
    methods: Iterable[str], keeps: Iterable[float], layouts: Sequence[str] | None = None, **changes: Any
) -> list[Recipe]:
    """The recipes of presets at several sizes.

    Args:
        methods: Names of presets.
        keeps: Shares of the experts that stay.
        layouts: For each preset those of these that it can have; None: the preset's own.
        changes: Of every recipe.

    Raises:
        ValueError: An unknown preset, "auto" (which compares by itself), a share out of range, or a preset that has
            none of the layouts.

    Returns:
        Each recipe once: where two presets are the same in a layout, under the name that came first.
    """
    keeps, recipes = list(keeps), []
    for method in methods:
        if method == AUTO:
            raise ValueError(f"The preset {AUTO!r} compares methods by itself. Name the others.")
        own = recipe_from_preset(method).layout
        possible = [own] if layouts is None else [layout for layout in layouts if layout in layouts_of(method)]
        if not possible:
            raise ValueError(
                f"{method!r} has the layouts {layouts_of(method)}, not {list(layouts)}. Name one of these."
            )
        wanted = [(layout, keep) for layout in possible for keep in keeps]
        recipes += [recipe_from_preset(method, layout=layout, keep=keep, **changes) for layout, keep in wanted]
    # Two presets may differ in nothing but their layout.
    steps = [{name: value for name, value in vars(recipe).items() if name != "preset"} for recipe in recipes]
    return [recipe for place, recipe in enumerate(recipes) if steps[place] not in steps[:place]]


def compare_methods(
    model: PreTrainedModel,
    recipes: Sequence[Recipe],
    calibration: Calibration,
    evaluation: Mapping[str, Calibration],
    *,
    progress: bool = True,
    report: Callable[[ComparedResult], None] | None = None,
) -> list[ComparedResult]:
    """Compress a copy of the model by each recipe and compare its predictions with the original's.

    All recipes that are not sequential share one forward over the calibration data, if the tokens that they keep of
    all layers fit in memory; otherwise each runs its own.

    Args:
        model: The original, all of it in memory; it is not changed.
        recipes: See `recipes_to_compare`.
        calibration: From `load_calibration`.
        evaluation: Rows by domain, see `load_evaluation_data`; none of them in `calibration`.
        progress: Show progress bars.
        report: Called with each result when it is there.

    Returns:
        One result a recipe, in their order. A recipe that the model cannot have says why in `skipped`. Memory: one
        more copy of the model, and what calibration collects.

    Raises:
        ValueError: Weights of the model are offloaded, or no text to evaluate on.
    """
    if any(has_offloaded_params(module) for module in model.modules()):
        raise ValueError("Weights of the model are offloaded, but recipes are tried on copies. Load it in memory.")
    recipes = [resolve_fit(model, recipe)[0] for recipe in recipes]
    shared = shared_collection(model, recipes, calibration, progress)
    results, baseline = [], BaselineLogits(model)
    for recipe in tqdm(recipes, "comparing", unit="recipe", disable=not progress):
        collected = shared if shared is not None and serves(shared_wanted(recipes), recipe) else None
        results.append(compare_one(baseline, recipe, calibration, evaluation, collected))
        gc.collect()  # modules refer to each other; a copy would stay in memory until the next collection
        if report is not None:
            report(results[-1])
    return results


def shared_wanted(recipes: Sequence[Recipe]) -> Wanted | None:
    """What the recipes that are not sequential need together; None where they draw tokens in different ways."""
    one_shot = [recipe for recipe in recipes if not recipe.sequential]
    try:
        return wanted_by_all(one_shot)
    except ValueError:
        return None


def serves(wanted: Wanted | None, recipe: Recipe) -> bool:
    """Whether a recipe finds what it needs in a collection."""
    needed = wanted_by(recipe)
    return wanted is not None and not needed.sequential and needed.statistics <= wanted.statistics


def shared_collection(
    model: PreTrainedModel, recipes: Sequence[Recipe], data: Calibration, progress: bool
) -> dict[str, Collected] | None:
    """What one forward leaves for all recipes that are not sequential; None where that does not fit in memory."""
    wanted = shared_wanted(recipes)
    found = find_layers(model)
    first_of_tied = tied_layers(found)
    layers = [layer for layer in found if layer.name not in first_of_tied]
    if wanted is None or not fits_at_once(layers, data, wanted):
        return None
    tied = {layer: first_of_tied[layer.name] for layer in found if layer.name in first_of_tied}
    return collect_first(model, layers, tied, data, wanted, progress)


def compare_one(
    baseline: BaselineLogits,
    recipe: Recipe,
    data: Calibration,
    evaluation: Mapping[str, Calibration],
    collected: Mapping[str, Collected] | None,
) -> ComparedResult:
    """Compress a copy of the baseline and judge it; what the model or the statistics rule out is said in `skipped`."""
    model = baseline.model
    what = {"method": recipe.preset, "layout": recipe.layout, "keep": recipe.keep, "recipe": recipe.to_dict()}
    start = time.perf_counter()
    try:
        check_layout(find_layers(model), recipe, model=model)
        planned = plan(model, recipe)
        compressed = copy.deepcopy(model)
        report = compress_in_memory(compressed, recipe, data, progress=False, start=start, collected=collected)
        seconds = time.perf_counter() - start
        scores: Evaluation = evaluate_model(compressed, evaluation, baseline=baseline, progress=False)
    except ValueError as error:
        return ComparedResult(**what, skipped=str(error))
    errors = [layer.relative_error for layer in report.layers if layer.relative_error is not None]
    return ComparedResult(
        **what,
        seconds=seconds,
        expert_bytes=planned.expert_bytes_after,
        total_bytes=report.total_bytes_after,
        active_parameters=planned.active_parameters_after,
        evaluation=scores.to_dict(),
        relative_error=sum(errors) / len(errors) if errors else None,
    )
