"""What a compressed model is: its class, its configuration, its sizes and its report."""

import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration import Calibration
from .config import FORMAT_VERSION
from .executors.processes import current
from .fitting import Fit
from .modeling.merged_model import merged_class
from .modeling.native_width import NativeFields, adopt_native
from .peak_memory import peak_memory
from .recipe import Recipe
from .recipe_reading import resolved
from .types import CompressionReport, LayerReport, MoeLayer


def conclude(
    model: PreTrainedModel,
    recipe: Recipe,
    data: Calibration,
    layers: list[MoeLayer],
    reports: list[LayerReport],
    layouts: dict[str, Any],
    *,
    native: NativeFields | None,
    before: tuple[int, int],
    after: tuple[int, int] | None = None,
    active_before: int,
    used_again: Sequence[str] = (),
    start: float,
    warnings: list[str],
    statistics: dict[str, Tensor] | None = None,
    fit: Fit | None = None,
) -> None:
    """Make a model whose layers are compressed what it is now, and attach its report.

    Args:
        model: Changed in place; its weights may be on the meta device.
        recipe: What was done.
        data: What it was done with.
        layers: The layers that it was done to.
        reports: One for each of them.
        layouts: Their entries in a mapped checkpoint, by name.
        native: What a configuration says of experts; None in the mapped layout.
        before: What `count` gave for the original model.
        after: What it gives for the result; None: it is counted.
        active_before: Active parameters of the original model, see `sizes.measure`.
        used_again: The layers whose experts are those of another layer too, once for each such layer.
        start: `time.perf_counter()` when the work began.
        warnings: For the report.
        statistics: For the report: those of all layers, see `layer_record`.
        fit: For the report: how `keep` was found.
    """
    architecture, name_or_path = type(model).__name__, model.config.name_or_path or None
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "scipy")}
    versions |= {"hf_mcsmoe": package_version(), "python": platform.python_version()}
    fingerprint = data.fingerprint()
    if recipe.layout == "mapped":
        provenance = {"base_model": name_or_path, "calibration": fingerprint, "versions": versions}
        adopt_mapped(model, recipe, layouts, architecture, provenance)
    else:
        adopt_native(model, layers, native, reports[0].num_experts_after, reports[0].widths[0])
    after = after or count(model)
    model.compression_report = CompressionReport(
        recipe=resolved(recipe),
        calibration=fingerprint,
        layers=reports,
        base_model=name_or_path,
        base_architecture=architecture,
        total_parameters_before=before[0],
        total_parameters_after=after[0],
        total_bytes_before=before[1],
        total_bytes_after=after[1],
        seconds=time.perf_counter() - start,
        versions=versions,
        warnings=warnings,
        active_parameters_before=active_before,
        active_parameters_after=active_before + active_change(layers, reports, after[0] - before[0], used_again),
        peak_memory=peak_memory(),
        fit=fit.to_dict() if fit is not None else None,
        num_processes=current().count,
        statistics=statistics or {},
    )


def active_change(
    layers: list[MoeLayer], reports: list[LayerReport], total_change: int, used_again: Sequence[str] = ()
) -> int:
    """How many more parameters one token uses in the result than in the original; at most, see `sizes.measure`.

    Args:
        layers: The compressed layers.
        reports: What became of them.
        total_change: How many more parameters the whole result has. What of that is not in experts, rows of native
            routers, every token uses.
        used_again: See `conclude`.
    """
    change = total_change
    for layer, report in zip(layers, reports, strict=True):
        num_before, num_after = report.num_experts_before, report.num_experts_after
        used_before = min(layer.top_k, num_before) * report.parameters_before // num_before
        used_after = min(layer.top_k, num_after) * report.parameters_after // num_after
        change += (1 + used_again.count(report.layer)) * (used_after - used_before)
        change -= report.parameters_after - report.parameters_before
    return change


def adopt_mapped(
    model: PreTrainedModel, recipe: Recipe, layouts: dict[str, Any], architecture: str, provenance: dict[str, Any]
) -> None:
    """Make the model an instance of the mapped version of its class, with the layout in its configuration."""
    model.config.merged_sparse_moe = {
        "recipe": recipe.to_dict(),
        "base_architecture": architecture,
        "layers": layouts,
        "provenance": provenance,
        "format_version": FORMAT_VERSION,
    }
    model.__class__ = merged_class(type(model))


def count(model: nn.Module) -> tuple[int, int]:
    """(parameters, bytes of all parameters) of a model, tied ones once, offloaded ones included."""
    named = dict(model.named_parameters(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    # Weights that Accelerate keeps elsewhere are different objects although they are tied.
    stored = [named.get(tied.get(name, name), parameter) for name, parameter in named.items()]
    parameters = {id(parameter): parameter for parameter in stored}.values()
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def package_version() -> str:
    """Version of this package as installed."""
    return version("hf-mcsmoe")
