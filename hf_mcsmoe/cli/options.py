"""Options that several commands share, and the recipe that they describe."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from ..allocation import ALLOCATION
from ..layer_budget import FIT
from ..recipe import LAYOUTS, PRESETS, Recipe
from ..recipe_reading import RECIPE_FIELDS, recipe_from_dict, recipe_from_preset, recipe_from_yaml

if TYPE_CHECKING:
    from ..fitting import Fit as Fitted

DEFAULT_PRESET = "m-smoe"


def completing(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """What the shell offers for an option: the choices that begin with what was typed."""
    listed = sorted(choices)
    return lambda incomplete: [choice for choice in listed if choice.startswith(incomplete)]


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, config.json or Hub id of a model.")]
Config = Annotated[
    str | None, typer.Option("--config", help="Recipe: a YAML file, or a preset (`hf-mcsmoe methods` lists them).")
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help=f"Method to start from (default: {DEFAULT_PRESET}); `hf-mcsmoe methods` lists them.",
        autocompletion=completing(PRESETS),
    ),
]
Keep = Annotated[float | None, typer.Option("--keep", help="Share of the experts that stays, in (0, 1]; default 0.5.")]
NumExperts = Annotated[
    int | None, typer.Option("--num-experts", help="Experts that a layer keeps on average; instead of --keep.")
]
Layout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        help="mapped (router kept, index map) or native (fewer router rows, plain model).",
        autocompletion=completing(LAYOUTS),
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        help=f"How experts, or neurons of a selection, are shared out among layers: {', '.join(ALLOCATION)}.",
        autocompletion=completing(ALLOCATION),
    ),
]
ExcludeLayer = Annotated[
    list[str] | None,
    typer.Option("--exclude-layer", help="Position of an MoE layer (0 is the first) or a name pattern; repeatable."),
]
Rank = Annotated[int | None, typer.Option("--rank", help="Decompose experts into low-rank factors of this rank.")]
KeepRows = Annotated[
    float | None, typer.Option("--keep-rows", help="Share of the rows of the sparse part beside the factors.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any field of the recipe, such as protect=super_experts, sequential=true or refit_options.ridge=0.01; "
        "repeatable.",
        autocompletion=completing(f"{name}=" for name in RECIPE_FIELDS),
    ),
]
Fit = Annotated[
    str | None,
    typer.Option("--fit", help="Instead of --keep: memory that the result must fit, such as 24GB, with its cache."),
]
ContextLength = Annotated[
    int | None, typer.Option("--context-length", help="With --fit: tokens of a row; default 4096.")
]
Rows = Annotated[int | None, typer.Option("--rows", help="With --fit: rows at a time; default 1.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
Output = Annotated[Path, typer.Option("--output", help="Folder for the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help=".txt, .jsonl, .parquet or .npy, or a folder that `calibrate` wrote; without it the text that ships.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", help=".txt, .jsonl, .parquet or .npy; repeatable; without it the text that ships."),
]
NumSamples = Annotated[int | None, typer.Option("--num-samples", help="Most rows of the data to use.")]
SequenceLength = Annotated[int | None, typer.Option("--sequence-length", help="Tokens in a row.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Rows in a forward pass.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the calibration sample and the steps.")]
Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", help="Also show what the models write after this; repeatable.")
]
DeviceMap = Annotated[str | None, typer.Option("--device-map", help="As in from_pretrained, e.g. auto.")]


def build_recipe(
    *,
    config: str | None = None,
    preset: str | None = None,
    keep: float | None = None,
    num_experts: int | None = None,
    layout: str | None = None,
    allocation: str | None = None,
    exclude_layer: list[str] | None = None,
    rank: int | None = None,
    keep_rows: float | None = None,
    fit: str | None = None,
    context_length: int | None = None,
    rows: int | None = None,
    seed: int | None = None,
    settings: list[str] | None = None,
) -> Recipe:
    """The recipe of the options: those given change that of `config` or `preset`.

    Raises:
        ValueError: Options that contradict each other, or a recipe that is not allowed.
        FileNotFoundError: `config` is neither a preset nor a file.
    """
    if config is not None and preset is not None:
        raise ValueError(f"--config {config!r} and --preset {preset!r} both name a recipe. Give one of them.")
    if config is None or config in PRESETS:
        base = recipe_from_preset(config or preset or DEFAULT_PRESET)
    else:
        base = recipe_from_yaml(config)
    changes: dict[str, Any] = {"allocation": allocation, "layout": layout, "seed": seed}
    changes = {name: value for name, value in changes.items() if value is not None}
    memory = {"fit": fit, "context_length": context_length, "rows": rows}
    if keep is not None or num_experts is not None:
        if fit is not None:
            raise ValueError("--fit finds what to keep, but --keep or --num-experts is given too. Give one of them.")
        changes |= {"keep": keep, "num_experts": num_experts, **memory}
    else:
        changes |= {name: value for name, value in memory.items() if value is not None}
        changes |= {"keep": FIT, "num_experts": None} if fit is not None else {}
    if layout not in (None, base.layout) and allocation is None:
        changes["allocation"] = None  # each layout has its own default
    if exclude_layer:
        changes["exclude_layers"] = tuple(as_layer(entry) for entry in exclude_layer)
    if rank is not None or keep_rows is not None:
        given = {"rank": rank, "keep_rows": keep_rows}
        options = base.decomposition_options | {name: value for name, value in given.items() if value is not None}
        changes |= {"decomposition": base.decomposition or "low_rank_sparse", "decomposition_options": options}
    return recipe_from_dict(with_settings({**base.to_dict(), **changes}, settings or (), taken=changes))


def with_settings(values: dict[str, Any], settings: Iterable[str], taken: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a recipe with those of --set, each FIELD=VALUE or STEP_options.OPTION=VALUE with VALUE in YAML.

    Raises:
        ValueError: One that is not of this kind, is given twice, or is of a field in `taken`, which another option
            gave.
    """
    values, seen = dict(values), set()
    for setting in settings:
        name, equals, text = setting.partition("=")
        field, dot, option = name.partition(".")
        if not equals or not name or (dot and not (option and field.endswith("_options"))):
            raise ValueError(
                f"--set {setting!r} must be FIELD=VALUE or STEP_options.OPTION=VALUE. "
                "Write --set router=hessian or --set refit_options.ridge=0.01, for example."
            )
        if name in seen or field in taken or field == "preset":
            raise ValueError(f"--set {setting!r}: {name!r} is given twice, or has an option of its own. Give it once.")
        seen.add(name)
        value = as_value(text, setting)
        values[field] = {**values.get(field, {}), option: value} if dot else value
    return values


def as_value(text: str, setting: str) -> Any:
    """What a text means in JSON, for which 1e-3 is a number as it is not for YAML; else in YAML."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {setting!r}: {text!r} is not valid YAML. Put it in quotes.") from error


def as_layer(entry: str) -> int | str:
    """A position for a whole number, else the pattern itself."""
    return int(entry) if re.fullmatch(r"-?\d+", entry) else entry


def fitted(recipe: Recipe, model: str, trust_remote_code: bool, dtype: str = "auto") -> "tuple[Recipe, Fitted | None]":
    """The recipe with a number for `keep`, and how it was found where it says "fit".

    Raises:
        ValueError: Nothing fits.
    """
    from ..fitting import resolve_fit
    from ..loading import empty_model, read_config

    loading = {"trust_remote_code": trust_remote_code}
    return resolve_fit(empty_model(read_config(model, **loading), **loading), recipe, dtype=dtype)
