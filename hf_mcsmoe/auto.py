"""The preset "auto": recipes are tried on copies of the model, and the one that changes it least is taken."""

import copy
import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

from accelerate.utils import has_offloaded_params
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .auto_candidates import AUTO, Candidate, candidates, fallback, possible, recipe_to_plan
from .calibration import Calibration
from .evaluation import check_causal, evaluate_model
from .executors.processes import current
from .families import find_layers
from .layouts import check_layout
from .recipe import Recipe
from .types import Trial

logger = logging.get_logger(__name__)


def check_auto(model: PreTrainedModel, request: Recipe) -> None:
    """Refuse, before anything runs, what "auto" cannot do.

    Raises:
        ValueError: A model whose predictions cannot be compared, a request that sets steps, or a model for which
            neither a candidate nor the fallback is possible.
    """
    try:
        check_causal(model)
    except TypeError as error:
        raise ValueError(
            f"The preset {AUTO!r} compares the next tokens that recipes predict. {error} "
            "Or name another preset, such as 'm-smoe'."
        ) from error
    recipe_to_plan(request, _checker(model))


def choose_recipe(
    model: PreTrainedModel,
    request: Recipe,
    data: Calibration,
    compress: Callable[[PreTrainedModel, Recipe], Any],
    *,
    progress: bool = True,
) -> tuple[Recipe, list[Trial]]:
    """Try every candidate on a copy of the model; the least mean KL(original || result) on held-out rows wins.

    Held-out calibration rows never enter statistics, but they choose ridges and guard refit and matching, of every
    candidate alike. No random number is drawn; ties go to the earlier candidate. Memory: one more copy of the model,
    on the same devices, freed after each trial.

    Args:
        model: Checked by `check_auto`; it is not changed.
        request: Of the preset "auto".
        data: Calibration batches; some must be held out.
        compress: Compresses a model in place as a recipe says.
        progress: Show a progress bar.

    Returns:
        The recipe of the best candidate, or of the fallback where none could be tried, and all trials.

    Raises:
        ValueError: Nothing is held out that could be predicted, or weights of the model are offloaded.
    """
    held_out = held_out_rows(data)
    if any(has_offloaded_params(module) for module in model.modules()):
        raise ValueError(
            f"Weights of the model are offloaded, but the preset {AUTO!r} copies the model in memory. "
            "Load it without offloading, or name a preset such as 'joint-obs' (mapped) or 'narrow-obs' (native)."
        )
    found = candidates(request, _checker(model))
    trials = [Trial(one.preset, one.changes, skipped=one.refused) for one in found]
    bar = tqdm(list(possible(found)), desc="trying recipes", unit="recipe", disable=not progress)
    for candidate in bar:
        trials[found.index(candidate)] = try_candidate(model, candidate, held_out, compress)
        gc.collect()  # modules refer to each other; a copy would stay in memory until the next collection
    trials = current().from_first(trials)
    best = min((trial for trial in trials if trial.kl is not None), key=lambda trial: trial.kl, default=None)
    if best is None:
        last = fallback(request)
        logger.warning(f"{AUTO} could try no recipe and takes {last.preset}: {trials[0].skipped}")
        return last.recipe, trials
    place = trials.index(best)
    trials[place] = dataclasses.replace(best, is_chosen=True)
    logger.info(table_of(trials))
    return found[place].recipe, trials


def try_candidate(
    model: PreTrainedModel,
    candidate: Candidate,
    held_out: Calibration,
    compress: Callable[[PreTrainedModel, Recipe], Any],
) -> Trial:
    """Compress a copy and compare it with the model. What only the statistics show to be impossible is skipped."""
    start = time.perf_counter()
    compressed = copy.deepcopy(model)
    try:
        compress(compressed, candidate.recipe)
        score = evaluate_model(compressed, {"held out": held_out}, baseline=model, progress=False).overall
    except ValueError as error:
        return Trial(candidate.preset, candidate.changes, skipped=str(error))
    seconds = time.perf_counter() - start
    return Trial(candidate.preset, candidate.changes, score.kl, score.loss - score.baseline_loss, seconds)


def held_out_rows(data: Calibration) -> Calibration:
    """The held-out batches as data to evaluate on.

    Raises:
        ValueError: None of them has two neighbouring tokens.
    """
    batches = [dataclasses.replace(batch, held_out=False) for batch in data.batches if batch.held_out]
    if not any((batch.token_mask[:, :-1] & batch.token_mask[:, 1:]).any() for batch in batches):
        raise ValueError(
            f"The calibration data ({data.source}) has {data.num_held_out_tokens} held-out tokens to predict, but the "
            f"preset {AUTO!r} chooses by these. Give at least two rows of text, or name another preset."
        )
    return Calibration(tuple(batches), f"held-out rows of {data.source}")


def record_choice(model: PreTrainedModel, recipe: Recipe, trials: list[Trial]) -> None:
    """Say in the report, and in a mapped checkpoint's provenance, that "auto" chose the recipe among `trials`."""
    report = dataclasses.replace(model.compression_report, tried=trials)
    if not any(trial.is_chosen for trial in trials):
        reasons = "; ".join(dict.fromkeys(trial.skipped for trial in trials))
        report.warnings.append(f"{AUTO} could try no recipe and took {recipe.preset}: {reasons}")
    model.compression_report = report
    entry = getattr(model.config, "merged_sparse_moe", None)  # None in the native layout
    if entry is not None:
        entry["provenance"]["chosen_by"] = AUTO


def table_of(trials: list[Trial]) -> str:
    """Trials as lines of text, the chosen one marked."""
    lines = [f"{AUTO} tried:"]
    for trial in trials:
        result = f"skipped: {trial.skipped}"
        if trial.skipped is None:
            result = f"KL {trial.kl:.5f}, loss {trial.loss_increase:+.5f}, {trial.seconds:.1f} s"
        lines.append(f"{'*' if trial.is_chosen else ' '} {trial.label}: {result}")
    return "\n".join(lines)


def _checker(model: PreTrainedModel) -> Callable[[Recipe], None]:
    layers = find_layers(model)
    return lambda recipe: check_layout(layers, recipe, model=model)
