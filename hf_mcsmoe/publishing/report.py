"""compression_report.json and recipe.yaml: what was done to a model, and how to do it again."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.scores import Evaluation
from ..recipe_reading import recipe_from_dict, resolved
from ..types import CompressionReport
from .statistics_file import write_statistics

REPORT_FILE = "compression_report.json"
RECIPE_FILE = "recipe.yaml"
FORMAT_VERSION = CompressionReport.format_version
# A list of plain numbers that json.dumps has spread over lines; no string holds a bare line end.
SPREAD_NUMBERS = re.compile(r"\[\n\s*([^\[\]{}\"]+?)\n\s*\]")


def write_report(
    report: CompressionReport | Mapping[str, Any],
    folder: str | Path,
    evaluation: Evaluation | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `compression_report.json` and `recipe.yaml` into a folder that exists.

    The statistics that a `CompressionReport` carries go into their own file, see `write_statistics`.

    Args:
        report: What `compress_moe` measured, or what `read_report` gave back.
        folder: The folder of the checkpoint.
        evaluation: Scores to add under "evaluation"; those that a read report already has stay without it.

    Returns:
        What was written. A number that is not finite becomes None, and a line of "warnings" says so.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The recipe in the report is not valid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r} for the report. Save the model there first.")
    values = report.to_dict() if isinstance(report, CompressionReport) else dict(report)
    if evaluation is not None:
        values["evaluation"] = evaluation.to_dict() if isinstance(evaluation, Evaluation) else dict(evaluation)
    values = {"format_version": values["format_version"], **values}
    lost: list[str] = []
    values = _finite(values, "", lost)
    values["warnings"] = [*values.get("warnings", []), *lost]
    recipe = recipe_yaml(values)
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    text = SPREAD_NUMBERS.sub(lambda match: f"[{' '.join(match.group(1).split())}]", text)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")
    if isinstance(report, CompressionReport):
        write_statistics(report.statistics, folder)
    return values


def read_report(folder: str | Path) -> dict[str, Any]:
    """The report of a compressed model, with the keys of `CompressionReport` and "evaluation" if it was evaluated.

    Args:
        folder: The folder of the checkpoint, or the path of the file itself.

    Raises:
        FileNotFoundError: There is no report.
        ValueError: It is no report, or one of a newer format than this version of the package reads.
    """
    path = Path(folder)
    path = path / REPORT_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {str(path)!r}. Give the folder of a model that hf_mcsmoe compressed and saved."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not valid JSON: {error}. Restore it from the model's repository."
        ) from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{str(path)!r} has no format_version, so it is no compression report. Is it another file?")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format_version {version}, this hf_mcsmoe reads up to {FORMAT_VERSION}. "
            "Upgrade it: pip install --upgrade hf-mcsmoe"
        )
    return values


def recipe_yaml(report: CompressionReport | Mapping[str, Any]) -> str:
    """The recipe of a report as YAML that `recipe_from_yaml` reads back to an equal `Recipe`.

    Every field that decides something is written out, also where it is the default of today.

    Raises:
        ValueError: The recipe in the report is not valid.
    """
    values = report.recipe if isinstance(report, CompressionReport) else report["recipe"]
    return yaml.safe_dump(resolved(recipe_from_dict(values)), sort_keys=False)


def _finite(value: Any, path: str, lost: list[str]) -> Any:
    """A copy without NaN and Inf, which JSON cannot hold; `lost` gets a line for each."""
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{path}.{key}" if path else str(key), lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{path}[{index}]", lost) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{path} was {value}; it is null in the report.")
        return None
    return value
