"""What report and model card say of a result that was exported, and the files that go along with it."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..evaluation import Evaluation
from ..modeling.shim import SHIM_NAME
from ..outcome import package_version
from ..publishing import CARD_FILE, RECIPE_FILE, REPORT_FILE

# Written anew; so are the page and the plots. The statistics, which are of the original model, are copied.
NOT_COPIED = {CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, f"{SHIM_NAME}.py"}
NOT_COPIED |= {CARD_FILE, RECIPE_FILE, REPORT_FILE}
NOT_COPIED_ENDINGS = (".html", ".png")
WEIGHTS = ".safetensors"
# What was measured of a layer under the gates of the mapped layout.
MEASURED_MAPPED = ("relative_error", "duplicate_share", "refit_error_before", "refit_error_after")


@dataclass(frozen=True)
class Changes:
    """What an export made of a checkpoint."""

    num_slots: int  # N
    num_experts: int  # M
    treatment: str  # of the routers
    has_dropped: bool  # some slots added nothing
    widths: tuple[int, int]  # neurons of the narrowest and of the widest expert
    width: int  # neurons of every expert now
    num_decomposed: int  # layers whose experts were decomposed
    parameters: tuple[int, int]  # of the mapped and of the native model
    bytes: tuple[int, int]

    @property
    def is_router_cut(self) -> bool:
        """Whether the model computes something else than before, and not just in another rounding."""
        return self.num_experts < self.num_slots

    def sentences(self) -> list[str]:
        """What was done, for people."""
        lines = []
        if self.is_router_cut:
            lines.append(
                f"The routers keep {self.num_experts} of {self.num_slots} entries (`{self.treatment}`). A token "
                "chooses among the stored experts alone: its gates, and often its experts, are others than in the "
                "mapped model."
            )
            if self.has_dropped:
                lines.append("Slots of dropped experts added nothing; their tokens go to other experts now.")
        else:
            lines.append("No router changed: the model computes what the mapped one did, up to rounding.")
        if self.num_decomposed:
            lines.append(f"The decomposed experts of {self.num_decomposed} layers were multiplied out.")
        if self.widths[0] < self.width:
            low, high = self.widths
            lines.append(
                f"Experts of {low} to {high} neurons were filled up with neurons of zeros, which add nothing to any "
                f"output, to {self.width}: a plain model has one width."
            )
        (old, new), (old_bytes, new_bytes) = self.parameters, self.bytes
        lines.append(f"Parameters: {old:,} mapped, {new:,} native; bytes: {old_bytes:,} mapped, {new_bytes:,} native.")
        return lines


def exported_report(
    report: Mapping[str, Any],
    changes: Changes,
    experts: Mapping[str, Sequence[Tensor]],
    scores: Evaluation | None,
) -> dict[str, Any]:
    """The report of the native model from that of the mapped one.

    What the cut routers made untrue is taken out: output errors of layers and scores. Sizes are those of the new
    checkpoint. "export" says what was done, and "warnings" what that means.

    Args:
        report: That of the mapped checkpoint.
        changes: What was done.
        experts: The tensors of the experts of each layer, by the name of its entry.
        scores: Of the native model with the mapped one as baseline; None: not evaluated.
    """
    values = {**report, "layers": [dict(entry) for entry in report["layers"]]}
    for entry in values["layers"]:
        tensors = experts.get(entry["layer"])
        if tensors is None:
            continue
        entry["parameters_after"] = sum(tensor.numel() for tensor in tensors)
        entry["bytes_after"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        entry["widths"] = [changes.width] * changes.num_experts
        if changes.is_router_cut:
            entry |= dict.fromkeys(MEASURED_MAPPED)
    values["total_parameters_after"], values["total_bytes_after"] = changes.parameters[1], changes.bytes[1]
    if changes.is_router_cut:
        values.pop("evaluation", None)
    values["export"] = {
        "layout": "native",
        "router_treatment": changes.treatment if changes.is_router_cut else None,
        "is_router_cut": changes.is_router_cut,
        "num_experts": changes.num_experts,
        "intermediate_size": changes.width,
        "changes": changes.sentences(),
        "against_mapped": scores.to_dict() if scores is not None else None,
        "hf_mcsmoe": package_version(),
    }
    values["warnings"] = [*report.get("warnings", []), *warnings(report, changes, scores)]
    return values


def warnings(report: Mapping[str, Any], changes: Changes, scores: Evaluation | None) -> list[str]:
    """What a reader of the report must know."""
    lines = []
    if changes.is_router_cut:
        lines.append(
            "Exported from the mapped layout with cut routers. Output errors of layers and scores that were measured "
            "before are those of the mapped model and left out."
        )
        if report.get("recovery"):
            lines.append("The losses of the recovery training are those of the mapped model too.")
    if scores is not None:
        overall = scores.overall
        lines.append(
            f"KL of the mapped model to this one: {overall.kl:.4f} nats per token; the same most likely token for "
            f"{overall.top1_agreement:.1%} of {overall.tokens:,} tokens ({', '.join(scores.domains)})."
        )
    elif changes.is_router_cut:
        lines.append("How far this model is from the mapped one was not evaluated.")
    return lines


def copy_other_files(files: Mapping[str, Path], complete: Path) -> list[str]:
    """Copy tokenizer, processor, chat template, statistics and the like of a checkpoint; returns their names.

    Args:
        files: Of the mapped checkpoint, by name, see `checkpoint_files`.
        complete: The new folder. What is in it already stays.
    """
    copied = []
    for name, path in files.items():
        is_weights = name.endswith(WEIGHTS) and "/" not in name
        if is_weights or name in NOT_COPIED or name.endswith(NOT_COPIED_ENDINGS) or (complete / name).exists():
            continue
        (complete / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, complete / name)
        copied.append(name)
    return copied
