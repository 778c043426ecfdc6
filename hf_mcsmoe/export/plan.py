"""What the native layout can hold of a mapped checkpoint: everything that can be refused before a weight is read."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import MergedSparseMoeConfig
from ..families import find_layers, tied_layers
from ..loading import MERGED_MODEL_TYPE, empty_model, read_config
from ..modeling.native_config import check_native
from ..modeling.native_width import native_fields
from ..publishing import read_report
from ..publishing.checkpoint_files import checkpoint_files
from ..types import MoeLayer

# What a layer's entry in the configuration may say; anything else is an expert that no plain model has.
KNOWN_KEYS = frozenset(
    {
        "num_experts",
        "num_slots",
        "has_dropped",
        "collapse_duplicates",
        "intermediate_size",
        "form",
        "num_neurons",
        "rank",
        "num_rows",
    }
)
AGAIN = "Compress the original model again with layout='native' (--layout native)"


@dataclass(frozen=True, eq=False)
class ExportPlan:
    """What an export will do, as far as configuration and report tell."""

    folder: Path
    files: Mapping[str, Path]  # of the checkpoint, by name
    empty: PreTrainedModel  # the original architecture with all its experts, on the meta device
    layers: Sequence[MoeLayer]  # of `empty`: those that were compressed, without those that share their experts
    excluded: Sequence[MoeLayer]  # of `empty`: those that kept all experts
    entries: Mapping[str, Mapping[str, Any]]  # in the report, for every compressed layer, by the name of its experts
    layouts: Mapping[str, Mapping[str, Any]]  # in the configuration, likewise
    num_experts: int  # M of every compressed layer
    report: Mapping[str, Any]

    @property
    def num_slots(self) -> int:
        """N of every compressed layer."""
        return self.layers[0].num_slots

    @property
    def is_router_cut(self) -> bool:
        """Whether the native routers have fewer rows."""
        return self.num_experts < self.num_slots


def plan_export(source: str | Path) -> ExportPlan:
    """Look at a mapped checkpoint, and refuse what cannot be native.

    Args:
        source: Folder or Hub id.

    Raises:
        FileNotFoundError: No such checkpoint, or no report in it.
        ValueError: It is not of the mapped layout, or the native one cannot hold it: different numbers of experts,
            fewer than the router picks, layers left out, an architecture without native layout, unknown kinds of
            experts.
    """
    config = read_config(source)
    if config.model_type != MERGED_MODEL_TYPE:
        raise ValueError(
            f"{str(source)!r} is a plain {config.model_type} model, no mapped checkpoint: other runtimes load it as "
            "it is. Give the folder of a checkpoint whose config.json says merged_sparse_moe."
        )
    empty = empty_model(original_config(config))
    folder = Path(source).expanduser() if Path(source).expanduser().exists() else Path(snapshot_download(str(source)))
    files, _ = checkpoint_files(folder)
    report = read_report(folder)
    found = find_layers(empty)
    tied = tied_layers(found)
    compressed = [layer for layer in found if layer.name in config.layers]
    layers = [layer for layer in compressed if layer.name not in tied]
    excluded = [layer for layer in found if layer.name not in config.layers and layer.name not in tied]
    by_name = {entry["layer"]: entry for entry in report["layers"]}
    first = {layer.name: tied.get(layer.name, layer).name for layer in compressed}
    unknown = [name for name in config.layers if first.get(name) not in by_name]
    if unknown or not layers:
        raise ValueError(
            f"The report in {str(source)!r} does not describe the layers {unknown[:5]} of the checkpoint. "
            "Restore compression_report.json from the model's repository."
        )
    plan = ExportPlan(
        folder=folder,
        files=files,
        empty=empty,
        layers=layers,
        excluded=excluded,
        entries={name: by_name[of_first] for name, of_first in first.items()},
        layouts=config.layers,
        num_experts=config.layers[layers[0].name]["num_experts"],
        report=report,
    )
    with refused(source):
        check_plan(plan)
    return plan


def original_config(config: MergedSparseMoeConfig) -> PreTrainedConfig:
    """The configuration of the original model, with all its experts, in the dtype of the checkpoint."""
    if config.base_config is None:
        raise ValueError(
            "The configuration is a request for compress_moe, it describes no model. Give a compressed checkpoint."
        )
    original = copy.deepcopy(config.base_config)
    original.architectures = [config.base_architecture]
    original.dtype = config.dtype if config.dtype is not None else original.dtype
    return original


@contextmanager
def refused(source: str | Path) -> Iterator[None]:
    """Say of an error about the native layout that it is about the export of `source`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{str(source)!r} cannot be exported to layout 'native': {error}") from error


def check_plan(plan: ExportPlan) -> None:
    """Refuse what the native layout cannot hold.

    Raises:
        ValueError: With the remedy.
    """
    for name, layout in plan.layouts.items():
        odd = sorted(set(layout) - KNOWN_KEYS)
        if odd:
            raise ValueError(
                f"{name!r} has {', '.join(odd)} in its layout, which no plain model can hold. {AGAIN}, or load it "
                "with hf_mcsmoe."
            )
    check_counts(plan)
    for layer in plan.layers:
        if "native" not in layer.family.layouts:
            raise ValueError(
                f"the architecture of {layer.name!r} has no such layout: {layer.family.not_native_because}. "
                "Load the mapped checkpoint with hf_mcsmoe."
            )
    drops_experts = any(layout["has_dropped"] for layout in plan.layouts.values())
    check_native(plan.layers, [plan.num_experts] * len(plan.layers), drops_experts=drops_experts)
    check_groups(plan)
    native_fields(plan.empty, plan.layers, plan.excluded, plan.num_experts, plan.layers[0].intermediate_size)


def check_counts(plan: ExportPlan) -> None:
    """Raise ValueError unless all compressed layers have the same numbers of slots and of experts."""
    first = plan.layers[0]
    numbers = {name: (layout["num_slots"], layout["num_experts"]) for name, layout in plan.layouts.items()}
    odd = [
        f"{name!r} ({number[1]} of {number[0]})" for name, number in numbers.items() if number != numbers[first.name]
    ]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        raise ValueError(
            f"it needs the same number of experts in all layers, but {first.name!r} has {plan.num_experts} of "
            f"{plan.num_slots}, and {', '.join(odd[:5])}{more} differ. Compress the original model again with "
            "allocation='uniform' (--allocation uniform), or with layout='native' (--layout native)."
        )


def check_groups(plan: ExportPlan) -> None:
    """Raise ValueError if a group-limited router would not keep the same number of rows in each of its groups."""
    for layer in plan.layers if plan.is_router_cut else ():
        groups = layer.num_router_groups
        dominants = torch.tensor(plan.entries[layer.name]["dominant_of_group"])
        kept = (dominants // (layer.num_slots // groups)).bincount(minlength=groups).tolist()
        if len(set(kept)) > 1:
            raise ValueError(
                f"the router of {layer.name!r} chooses within {groups} groups of {layer.num_slots // groups} slots, "
                f"of which {kept} would stay, and it needs the same number in each. {AGAIN}, which sees to that."
            )
