"""From a mapped checkpoint to a plain one: the original architecture with fewer or narrower experts."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..checkpoint import check_free_space, check_output_folder, replacing
from ..evaluation import Evaluation, evaluate_model
from ..families import find_layers
from ..layer_budget import ALIGNED_NEURONS
from ..loading import load_model
from ..modeling.client_keys import add_client_keys
from ..modeling.densify import densify
from ..modeling.forms import form_layers
from ..modeling.forms.ragged import RaggedExperts
from ..modeling.mapped_to_native import RouterCut, native_config, native_model, native_tensors
from ..modeling.native_width import native_fields
from ..outcome import count
from ..publishing import write_card, write_pages, write_report
from ..publishing.card import local_licence
from ..routing.treatments import TREATMENTS
from ..types import ExpertGroups, MoeLayer
from .plan import ExportPlan, plan_export, refused
from .report import Changes, copy_other_files, exported_report


def export_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    router: str = "dominant_rows",
    router_options: Mapping[str, Any] | None = None,
    data: Mapping[str, Calibration] | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a mapped checkpoint in the native layout: a plain model that loads everywhere without this package.

    Decomposed experts are multiplied out, and experts of different widths filled up with neurons of zeros to the
    widest of all layers (rounded up to a multiple of 8 where the original width is one). Where there are fewer
    experts than slots the routers are cut to one entry for each. Only the last changes what the model computes beyond
    rounding: a token chooses among M experts, and its gates change. `compress_moe` with layout="native" has a refit
    see these gates, so it loses less. With M = N and dense experts the weights are those of the checkpoint, bit for
    bit.

    It takes the memory of the mapped model and of what is multiplied out or filled up, and with `data` twice that.

    Args:
        source: Folder or Hub id of a mapped checkpoint with its report.
        output_dir: Where to write; written beside it first and renamed when complete.
        router: How routers are cut, a name in `hf_mcsmoe.routing.treatments`.
        router_options: Options of that treatment.
        data: Batches to compare the two models on, see `load_evaluation_data`; None: the report says "not evaluated".
        batch_size: Most rows in one forward of that comparison.
        overwrite: Replace a folder `output_dir` that is not empty.
        progress: Show bars over layers and batches.

    Returns:
        The report that was written, with what the export did under "export".

    Raises:
        FileNotFoundError: No such checkpoint, or no report in it.
        FileExistsError: `output_dir` is not empty.
        ValueError: An unknown treatment or what the native layout cannot hold, before anything is written; or `data`
            that the models cannot be evaluated on.
        OSError: Too little space on the disk.
    """
    TREATMENTS.check_options(router, dict(router_options or {}))
    output = check_output_folder(output_dir, overwrite)
    plan = plan_export(source)
    with refused(source):
        native, changes = convert(plan, router, router_options or {}, progress)
    check_free_space(output, changes.bytes[1])
    with replacing(output) as complete:
        native.save_pretrained(complete)
        add_client_keys(complete, native.config, plan.report["base_model"])
        copy_other_files(plan.files, complete)
        layers = {layer.name: list(layer.expert_parameters.values()) for layer in find_layers(native)}
        del native
        scores = compare(plan.folder, complete, data, batch_size, progress) if data is not None else None
        report = write_report(exported_report(plan.report, changes, layers, scores), complete)
        write_pages(complete)
        write_card(complete, repo_name=output.absolute().name, **licence_of(plan.folder))
    return report


def convert(
    plan: ExportPlan, router: str, options: Mapping[str, Any], progress: bool
) -> tuple[PreTrainedModel, Changes]:
    """The native model of a mapped checkpoint, ready to be saved but not to run, and what was done.

    Raises:
        ValueError: See `export_checkpoint`.
    """
    mapped = load_model(plan.folder)
    before, widths = count(mapped), widths_of_forms(mapped)
    decomposed = len(form_layers(mapped)) - len(widths)
    densify(mapped)
    found = {layer.name: layer for layer in find_layers(mapped)}
    for name in plan.layouts:
        widths.setdefault(name, [found[name].intermediate_size])
    narrowest, widest = min(map(min, widths.values())), max(map(max, widths.values()))
    width = aligned(widest, plan.layers[0].intermediate_size)
    fields = native_fields(plan.empty, plan.layers, plan.excluded, plan.num_experts, width)
    cuts = {name: router_cut(plan, found[name], router, options) for name in plan.layouts}
    with tqdm(total=len(cuts), desc="exporting", unit="layer", disable=not progress, delay=2) as bar:
        tensors = native_tensors(mapped, cuts, width, bar.update)
    config = native_config(plan.empty.config, fields, plan.num_slots, plan.num_experts, width)
    native = native_model(type(plan.empty), config, tensors)
    if hasattr(mapped, "generation_config"):  # not in models that do not generate
        native.generation_config = copy.deepcopy(mapped.generation_config)
    after = count(native)
    return native, Changes(
        num_slots=plan.num_slots,
        num_experts=plan.num_experts,
        treatment=router,
        has_dropped=any(layout["has_dropped"] for layout in plan.layouts.values()),
        widths=(narrowest, widest),
        width=width,
        num_decomposed=decomposed,
        parameters=(before[0], after[0]),
        bytes=(before[1], after[1]),
    )


def widths_of_forms(model: PreTrainedModel) -> dict[str, list[int]]:
    """Neurons of each expert of the layers whose experts differ in width, by the path of the experts module."""
    forms = form_layers(model)
    return {name: form.packed().widths.tolist() for name, form in forms.items() if isinstance(form, RaggedExperts)}


def aligned(width: int, original: int) -> int:
    """The least width that holds `width` neurons in steps that the original one is made of, see `ALIGNED_NEURONS`."""
    unit = math.gcd(original, ALIGNED_NEURONS)
    return unit * max(1, math.ceil(width / unit))


def router_cut(plan: ExportPlan, layer: MoeLayer, treatment: str, options: Mapping[str, Any]) -> RouterCut:
    """How the router of a layer is cut, from the map in the weights and the leaders in the report.

    Raises:
        ValueError: They contradict each other.
    """
    entry = plan.entries[layer.name]
    index = layer.experts.expert_map.index[: layer.num_slots].cpu()
    try:
        groups = ExpertGroups(index, torch.tensor(entry["dominant_of_group"]))
    except ValueError as error:
        raise ValueError(
            f"the report does not fit the expert map of {layer.name!r}: {error} "
            "Restore compression_report.json from the model's repository."
        ) from error
    return RouterCut(groups, torch.tensor(entry["usage_frequency"], dtype=torch.float64), treatment, options)


def compare(
    mapped: Path, native: Path, data: Mapping[str, Calibration], batch_size: int | None, progress: bool
) -> Evaluation:
    """Scores of the native model with the mapped one as baseline."""
    return evaluate_model(
        load_model(native), data, baseline=load_model(mapped), batch_size=batch_size, progress=progress
    )


def licence_of(folder: Path) -> dict[str, Any]:
    """The licence that the card of the mapped checkpoint declares, as an option of `write_card`."""
    licence = local_licence(str(folder))
    return {"base_license": licence} if licence else {}
