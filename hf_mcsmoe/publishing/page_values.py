"""What the report page shows, as texts and tables, from the plain values of the report."""

import statistics
from collections.abc import Mapping
from typing import Any

from ..recipe import PRESETS, STEPS, Recipe
from ..recipe_reading import recipe_from_dict
from .card_text import CALIBRATION_LABELS, NOT_EVALUATED, NOT_MEASURED, count, size
from .page_scores import more_scores, scores_table
from .page_table import Table, plain, words
from .report import recipe_yaml
from .report_parts import layer_numbers, neurons_of_layers, parts_of_size

ARROW = " → "
DEVICES = {"process": "largest resident memory of the process"}


def page_values(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template of the page shows, by its names.

    Args:
        report: What `read_report` gave, without paths of this machine.
    """
    recipe = recipe_from_dict(report["recipe"])
    scores = report.get("evaluation")
    return {
        "title": f"{model_name(report)}, compressed",
        "lead": _lead(report, recipe),
        "tiles": _tiles(report, scores),
        "sizes": _sizes(report),
        "scores": scores_table(scores) if scores else None,
        "more_scores": more_scores(scores) if scores else [],
        "recovery": _recovery(report.get("recovery")),
        "layers": _layers(report),
        "trials": _trials(report.get("tried") or []),
        "recipe": recipe_yaml(report).strip(),
        "calibration": _calibration(report["calibration"]),
        "warnings": list(report.get("warnings") or []),
        "run": _run(report),
    }


def model_name(report: Mapping[str, Any]) -> str:
    """The base model, without the "./" that stands for folders."""
    return (report["base_model"] or "A model without a name").removeprefix("./")


def _lead(report: Mapping[str, Any], recipe: Recipe) -> dict[str, str | None]:
    layers = report["layers"]
    before, after = (sum(layer[f"num_experts_{time}"] for layer in layers) for time in ("before", "after"))
    experts = f"{count(before)}{ARROW}{count(after)} experts"
    neurons = neurons_of_layers(layers)
    if neurons is not None:
        experts += f" with {ARROW.join(count(sum(numbers)) for numbers in neurons)} neurons"
    preset = PRESETS.get(recipe.preset)
    return {
        "experts": f"{experts} in {count(len(layers))} MoE layers",
        "architecture": report["base_architecture"],
        "layout": recipe.layout,
        "preset": recipe.preset,
        "paper": preset.paper if preset else None,
        "url": preset.url if preset else None,
        "steps": ", ".join(f"{step} {getattr(recipe, step)}" for step in STEPS if getattr(recipe, step) is not None),
    }


def _tiles(report: Mapping[str, Any], scores: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """(label, large, small) of the few numbers that matter most."""
    tiles = []
    for label, name, written in (("bytes", "total_bytes", _short_size), ("parameters", "total_parameters", _short)):
        before, after = report[f"{name}_before"], report[f"{name}_after"]
        tiles.append((label, f"{after / before:.1%}", f"{written(before)}{ARROW}{written(after)}"))
    errors = [layer["relative_error"] for layer in report["layers"] if layer["relative_error"] is not None]
    worst = f"largest {max(errors):.3g}" if errors else "no held-out tokens"
    median = f"{statistics.median(errors):.3g}" if errors else NOT_MEASURED
    tiles.append(("median output error of a layer", median, worst))
    overall = (scores or {}).get("overall") or {}
    if overall.get("baseline_loss") is None:
        tiles.append(("loss increase", NOT_EVALUATED, "against the base model"))
    else:
        increase = overall["loss"] - overall["baseline_loss"]
        kl = "" if overall.get("kl") is None else f"; KL {overall['kl']:.4f}"
        tiles.append(("loss increase", f"{increase:+.4f}", f"nats per token{kl}"))
    return tiles


def _sizes(report: Mapping[str, Any]) -> Table:
    experts, rest = parts_of_size(report)
    totals = [(report[f"total_{what}_before"], report[f"total_{what}_after"]) for what in ("parameters", "bytes")]
    active = (report.get("active_parameters_before"), report.get("active_parameters_after"))
    rows = [
        _before_after("parameters", totals[0], count),
        *([] if None in active else [_before_after("parameters that a token uses", active, count)]),
        _before_after("bytes", totals[1], size),
        _before_after("bytes of experts in compressed layers", experts, size),
        _before_after("bytes of the rest", rest, size),
    ]
    return Table(["", "before", "after", "after / before"], rows)


def _before_after(label: str, numbers: tuple[int, int], written: Any) -> list[str]:
    before, after = numbers
    return [label, written(before), written(after), f"{after / before:.1%}" if before else "-"]


def _recovery(recovery: Mapping[str, Any] | None) -> Table | None:
    if not recovery:
        return None
    before, after = recovery["held_out_before"], recovery["held_out_after"]
    rows = [[words(name), f"{before[name]:.4f}", f"{after[name]:.4f}"] for name in before if name in after]
    note = f"{count(recovery['steps'])} steps; teacher {recovery['teacher']}. Output errors of layers are from before."
    return Table(["nats per predicted token", "before", "after"], rows, notes=[note])


def _layers(report: Mapping[str, Any]) -> Table:
    """One row a layer; columns that say nothing of any layer are left out."""
    layers = report["layers"]
    numbers, what = layer_numbers(report)
    is_numbered = what == "decoder layer"
    columns = {
        "layer": numbers if is_numbered else [layer["layer"] for layer in layers],
        "experts": [f"{count(x['num_experts_before'])}{ARROW}{count(x['num_experts_after'])}" for x in layers],
        "width": [_widths(layer) for layer in layers],
        "rank": [_rank(layer) for layer in layers],
        "parameters": [f"{count(x['parameters_before'])}{ARROW}{count(x['parameters_after'])}" for x in layers],
        "bytes": [f"{count(x['bytes_before'])}{ARROW}{count(x['bytes_after'])}" for x in layers],
        "output error": [_or(layer["relative_error"], "{:.4g}", NOT_MEASURED) for layer in layers],
        "error before refit": [_or(layer.get("refit_error_before"), "{:.4g}", "") for layer in layers],
        "duplicates": [_or(layer["duplicate_share"], "{:.1%}", "") for layer in layers],
        "never chosen": [count(layer["unused_experts"]) for layer in layers],
        "seconds": [_or(layer["seconds"], "{:.2f}", "") for layer in layers],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    notes = [f"Layer {numbers[0]} is {layers[0]['layer']}."] if is_numbered and layers else []
    refitted = sum(layer.get("shared_expert_refitted", False) for layer in layers)
    notes += [f"The refit also changed the shared expert of {count(refitted)} of the layers."] if refitted else []
    return Table(list(shown), [list(row) for row in zip(*shown.values(), strict=True)], notes=notes)


def _or(value: float | None, form: str, otherwise: str) -> str:
    return otherwise if value is None else form.format(value)


def _widths(layer: Mapping[str, Any]) -> str:
    """Neurons of an expert, before and after where that differs: one number, or the least and the most."""
    widths = layer["widths"]
    now = "-" if not widths else count(min(widths))
    if widths and max(widths) != min(widths):
        now += f" to {count(max(widths))}"
    before = layer.get("width_before")
    return now if before is None or now == count(before) else f"{count(before)}{ARROW}{now}"


def _rank(layer: Mapping[str, Any]) -> str:
    if layer.get("rank") is None:
        return ""
    return f"{count(layer['rank'])} + {count(layer['sparse_rows'] or 0)} rows"


def _trials(trials: list[Mapping[str, Any]]) -> Table | None:
    if not trials:
        return None
    rows = []
    for trial in trials:
        label = ", ".join([trial["preset"], *(f"{name}={value}" for name, value in trial["changes"].items())])
        if trial["kl"] is None:
            rows.append([label, "-", "-", "-", trial["skipped"] or ""])
        else:
            numbers = [f"{trial['kl']:.4f}", f"{trial['loss_increase']:+.4f}", f"{trial['seconds']:.0f}"]
            rows.append([label, *numbers, "chosen" if trial["is_chosen"] else ""])
    return Table(["recipe", "KL (nats)", "loss increase (nats)", "seconds", ""], rows)


def _calibration(calibration: Mapping[str, Any] | None) -> Table:
    if not calibration:
        return Table(["", ""], [["calibration data", "none is recorded"]], is_text=True)
    rows = [[CALIBRATION_LABELS.get(key, words(key)), plain(value)] for key, value in calibration.items()]
    return Table(["", ""], rows, is_text=True)


def _run(report: Mapping[str, Any]) -> Table:
    rows = [["time", NOT_MEASURED if report["seconds"] is None else f"{report['seconds']:,.1f} s"]]
    peaks = report.get("peak_memory") or {"process": None}
    for device, number in peaks.items():
        label = DEVICES.get(device, f"largest memory that torch allocated on {device}")
        rows.append([label, NOT_MEASURED if number is None else size(number)])
    rows += [[name, version] for name, version in report["versions"].items()]
    return Table(["", ""], [*rows, ["format of the report", str(report["format_version"])]], is_text=True)


def _short(number: float, units: tuple[tuple[str, float], ...] = (("B", 1e9), ("M", 1e6), ("k", 1e3))) -> str:
    """Three digits and a unit."""
    unit, factor = next(((unit, factor) for unit, factor in units if number >= factor), ("", 1))
    return f"{number / factor:.3g} {unit}".strip()


def _short_size(number: float) -> str:
    return _short(number, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1)))
