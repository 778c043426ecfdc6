"""The tables and sentences of the model card, from the plain values of the report."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..decomposition import DECOMPOSITION
from ..recipe import OPTIONAL_STEPS, PRESETS, STEPS, Recipe
from ..recipe_reading import recipe_from_preset
from ..solvers.low_rank import DEFAULT_RANK
from .card_scores import NOT_EVALUATED as NOT_EVALUATED
from .card_scores import plain, score_limits, score_sections

NOT_MEASURED = "not measured"
CALIBRATION_LABELS = {
    "sha256": "SHA-256 of tokens and masks",
    "tokens": "tokens for the statistics",
    "held_out_tokens": "tokens held out to measure output errors",
}
RECOVERY_LABELS = {"loss_task": "loss against the text", "kl": "KL to the teacher, at the temperature"}
SHOWN_ARGUMENTS = ("temperature", "task_weight", "distillation_weight", "learning_rate", "num_train_epochs")
NUM_WORST_LAYERS = 3


def sections(report: Mapping[str, Any], recipe: Recipe, scores: Mapping[str, Any] | None, base: str) -> dict[str, Any]:
    """What the template shows, by the template's names.

    Args:
        report: See `CompressionReport.to_dict`.
        recipe: The recipe in it.
        scores: See `Evaluation.to_dict`; None: not evaluated.
        base: The base model in words, see `link`.
    """
    return {
        "summary": _summary(report, base),
        "sizes": _sizes(report),
        "layers": [_layer_row(run) for run in _runs(report["layers"])],
        **score_sections(scores),
        "method": [
            *_method(recipe),
            *_shared(report["layers"]),
            *_choice(report.get("tried")),
            *_export(report.get("export")),
        ],
        "calibration": _calibration(report["calibration"]),
        "recovery": _recovery(report.get("recovery")),
        "limitations": [*_layer_limits(report), *score_limits(scores), *map(plain, report["warnings"])],
        "made_with": _made_with(report),
        "citation": _citation(recipe),
    }


def count(number: int) -> str:
    """12,345,678."""
    return f"{number:,}"


def size(number: int) -> str:
    """Bytes, exact and in the largest unit that fits: 12,345,678 (12.35 MB)."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number:,} ({number / factor:.2f} {unit})"
    return f"{number:,}"


def link(hub_id: str | None, path: str | None) -> str:
    """The base model in words: a link to the Hub, or the last part of a local path."""
    if hub_id is not None:
        return f"[{hub_id}](https://huggingface.co/{hub_id})"
    # The folders above tell about the machine, not about the model.
    return f"the local model `{plain(Path(path).name)}`" if path else "a model without a name"


def licence(metadata: Mapping[str, str], base: str) -> str:
    """What the card says about the licence that `metadata` declares."""
    if not metadata:
        return f"That of {base}, which was not known when this card was written; see there before you use the model."
    name = metadata.get("license_name", metadata.get("license"))
    name = f"[{name}]({metadata['license_link']})" if "license_link" in metadata else f"`{name}`"
    return f"{name}, inherited from {base}."


def _summary(report: Mapping[str, Any], base: str) -> str:
    layers = report["layers"]
    before, after, old, new = (
        sum(layer[f"{what}_{time}"] for layer in layers)
        for what in ("num_experts", "parameters")
        for time in ("before", "after")
    )
    where = f"in {_times(len(layers), 'MoE layer')}"
    if before == after:
        what = f"{new / old:.1%} of the parameters of its {count(before)} experts {where}"
    else:
        what = f"{count(after)} experts instead of {count(before)} {where}, {new / old:.1%} of the expert parameters"
    return f"This is {base} with {what}. Made with `hf_mcsmoe`."


def _times(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def _sizes(report: Mapping[str, Any]) -> list[list[str]]:
    """Name, before, after and share of each size; reports of older versions do not know the active parameters."""
    is_average = any(len(set(layer["widths"])) > 1 for layer in report["layers"])
    kinds = (
        ("parameters", "total_parameters", count),
        (f"active parameters of a token{', on average' if is_average else ''}", "active_parameters", count),
        ("bytes", "total_bytes", size),
    )
    rows = []
    for label, name, written in kinds:
        before, after = (report.get(f"{name}_{time}") for time in ("before", "after"))
        if before is None or after is None:
            rows.append([label, *[NOT_MEASURED] * 3])
        else:
            rows.append([label, written(before), written(after), f"{after / before:.1%}"])
    return rows


def _runs(layers: list[dict]) -> list[list[dict]]:
    """Neighbouring layers with equal numbers of experts, parameters and bytes."""
    names = [f"{what}_{time}" for what in ("num_experts", "parameters", "bytes") for time in ("before", "after")]
    return [list(run) for _, run in groupby(layers, key=lambda layer: [layer[name] for name in names])]


def _layer_row(run: list[dict]) -> list[str]:
    first, last = (run[place]["layer"].split(".") for place in (0, -1))
    if len(first) == len(last):
        name = ".".join(a if a == b else f"{a}…{b}" for a, b in zip(first, last, strict=True))
    else:
        name = f"{run[0]['layer']} … {run[-1]['layer']}"
    numbers = [
        f"{count(run[0][f'{what}_before'])} → {count(run[0][f'{what}_after'])}"
        for what in ("num_experts", "parameters", "bytes")
    ]
    errors = [layer["relative_error"] for layer in run if layer["relative_error"] is not None]
    error = NOT_MEASURED
    if errors:
        error = " to ".join(dict.fromkeys(f"{limit:.4g}" for limit in (min(errors), max(errors))))
        error += f" ({len(errors)} of {len(run)} measured)" if len(errors) < len(run) else ""
    return [f"`{name}`", str(len(run)), *numbers, error]


def _method(recipe: Recipe) -> list[str]:
    preset = PRESETS.get(recipe.preset)
    lines = ["A recipe of its own, no published preset."]
    if preset is not None:
        lines = [f"`{recipe.preset}`: {preset.paper}, <{preset.url}>. {preset.notes}"]
        budget = {"keep": recipe.keep, "num_experts": recipe.num_experts, "layout": recipe.layout}
        published = recipe_from_preset(recipe.preset, **budget)
        names = [f"{step}{suffix}" for step in STEPS for suffix in ("", "_options")]
        names += ["exclude_layers"]
        changed = [f"`{name}`" for name in names if getattr(recipe, name) != getattr(published, name)]
        if changed:
            lines.append(f"Changed from the preset: {', '.join(changed)}.")
    steps = [
        f"{step} `{getattr(recipe, step)}`"
        for step in STEPS
        if not (step in OPTIONAL_STEPS and getattr(recipe, step) is None)
        and not (step == "importance" and recipe.merging is None)
    ]
    lines.append(f"Steps: {', '.join(steps)}; layout `{recipe.layout}`.")
    if recipe.is_ranked:
        lines.append(
            f"Each stored matrix is factors of a low rank, another one for each expert ({recipe.decomposition})."
        )
    elif recipe.decomposition is not None:
        options = DECOMPOSITION.options(recipe.decomposition) | recipe.decomposition_options
        size = f"rank {options['rank'] or DEFAULT_RANK}"
        if options["parameter_ratio"] is not None:
            size = f"{100 * options['parameter_ratio']:g}% of its parameters"
        lines.append(
            f"Each stored matrix is factors of {size} plus {100 * options['keep_rows']:g}% of the rows of the "
            f"residual (`{recipe.decomposition}`)."
        )
    return lines


def _calibration(calibration: Mapping[str, Any] | None) -> list[str]:
    if not calibration:
        return ["No calibration data is recorded."]
    lines = []
    for key, value in calibration.items():
        written = count(value) if isinstance(value, int) and not isinstance(value, bool) else f"`{plain(value)}`"
        lines.append(f"{CALIBRATION_LABELS.get(key, key.replace('_', ' '))}: {written}")
    return lines


def _recovery(recovery: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `recovery_report.json` says, which the report holds as well; None: there was no training."""
    if not recovery:
        return None
    before, after, arguments = (recovery[name] for name in ("held_out_before", "held_out_after", "arguments"))
    rows = [
        [RECOVERY_LABELS[name], f"{value:.4f}", f"{after[name]:.4f}"]
        for name, value in before.items()
        if name in RECOVERY_LABELS
    ]
    data = recovery["data"]
    routers = "frozen" if arguments["freeze_routers"] else "trained"
    routers += ", nothing else" if arguments.get("only_routers") else ""
    settings = ", ".join(f"`{name}` {arguments[name]}" for name in SHOWN_ARGUMENTS)
    lines = [
        f"Teacher: `{plain(recovery['teacher'])}`. Routers {routers}. {settings}; {count(recovery['steps'])} steps.",
        f"Data: {', '.join(f'`{plain(source)}`' for source in data['sources'])}, {count(data['rows'])} rows, "
        f"{count(data['tokens'])} tokens; {count(data['held_out_rows'])} rows held out; SHA-256 `{data['sha256']}`.",
        "The output errors of the layers above were measured before the training.",
    ]
    pruned = recovery.get("row_pruning")
    if pruned:
        lines.append(
            f"The experts' matrices are factors of rank {pruned['rank']} plus {count(pruned['kept_rows'])} of "
            f"{count(pruned['rows'])} rows, chosen by their importance for the loss while they were trained."
        )
    return {"rows": rows, "lines": lines}


def _layer_limits(report: Mapping[str, Any]) -> list[str]:
    measured = [layer for layer in report["layers"] if layer["relative_error"] is not None]
    worst = sorted(measured, key=lambda layer: -layer["relative_error"])[:NUM_WORST_LAYERS]
    names = ", ".join(f"`{layer['layer']}` ({layer['relative_error']:.4g})" for layer in worst)
    lines = [
        f"Layers whose output changed most on held-out calibration tokens, with their output error: {names}."
        if worst
        else f"The change of the layers' outputs on held-out tokens was {NOT_MEASURED}."
    ]
    unused = [layer for layer in report["layers"] if layer["unused_experts"] > 0]
    if unused:
        number = sum(layer["unused_experts"] for layer in unused)
        lines.append(
            f"No calibration token was routed to {_times(number, 'expert')} in {_times(len(unused), 'layer')}: what "
            "became of these rests on no data."
        )
    return lines


def _made_with(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    duration = "" if report["seconds"] is None else f"in {report['seconds']:,.1f} s "
    return f"Made {duration}with {versions}."


def _shared(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """In how many layers the refit changed the shared expert; nothing where in none, or in reports of old."""
    number = sum(layer.get("shared_expert_refitted", False) for layer in layers)
    return [f"The refit also changed the shared expert of {_times(number, 'layer')}."] if number else []


def _choice(trials: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """How the preset "auto" came to the recipe; nothing for a recipe that was asked for, or reports of old."""
    number = sum(trial["skipped"] is None for trial in trials or [])
    if number == 0:
        return []
    return [f"Chosen by `auto` from {_times(number, 'recipe')}, by their KL on calibration tokens that were held out."]


def _export(export: Mapping[str, Any] | None) -> list[str]:
    """What an export changed; nothing for a result as it was made."""
    return [f"Exported to layout `{export['layout']}` afterwards: {' '.join(export['changes'])}"] if export else []


def _citation(recipe: Recipe) -> str:
    preset = PRESETS.get(recipe.preset)
    if preset is None:
        return "The recipe is no published preset; cite the papers of its steps and of the base model."
    return f"{preset.paper}. <{preset.url}>. Cite the base model as well."
