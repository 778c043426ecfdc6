"""The second stage of MC-SMoE in a recovery: rows of decomposed experts are pruned while they are trained."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..decompose import check_decomposition, decompose_merged, merged_layers
from ..modeling.experts import is_same_layer
from ..modeling.forms import form_layers
from ..modeling.forms.low_rank_sparse import LowRankSparseExperts
from ..outcome import count
from ..report_types import factor_sizes
from ..sizes import form_sizes
from ..solvers.low_rank import DEFAULT_RANK, check_budget
from .row_pruner import count_rows, decomposed_layers, sparse_parts
from .schedule import SparsitySchedule, warmup_steps
from .sparsity import SparsityScheduleCallback


@dataclass(frozen=True)
class RowPruning:
    """What becomes of the rows of the experts' matrices while a recovery trains them; see `SparsityScheduleCallback`.

    Attributes:
        final_keep_rows: Share of all rows of all decomposed matrices that stay in the end (paper: 0.1).
        rank: For dense experts, which are decomposed before the training; None is 32, the paper's.
        initial_warmup: First steps in which all rows stay: a number, or a share of the training below 1.
        final_warmup: Last steps in which the rows do not change any more; likewise.

    Raises:
        ValueError: A number out of range.
    """

    final_keep_rows: float
    rank: int | None = None
    initial_warmup: float = 0.04
    final_warmup: float = 0.16

    def __post_init__(self) -> None:
        check_budget({"rank": self.rank})
        SparsitySchedule(0, 0, 0, self.final_keep_rows)  # refuses what is no share
        for name in ("initial_warmup", "final_warmup"):
            warmup_steps(getattr(self, name), 1, name)

    @property
    def decomposition_options(self) -> dict[str, Any]:
        """How dense experts are decomposed: all rows are kept, so that training decides which ones stay."""
        return {"rank": self.rank or DEFAULT_RANK, "keep_rows": 1.0}

    def callback(self) -> SparsityScheduleCallback:
        """What prunes while a Trainer trains, and drops the other rows in the end."""
        return SparsityScheduleCallback(self.final_keep_rows, self.initial_warmup, self.final_warmup)

    def check(self, model: nn.Module) -> None:
        """Refuse a model that cannot be trained that way; it may be on the meta device.

        Raises:
            ValueError: It has neither decomposed nor dense merged experts, the latter cannot be decomposed, a rank is
                given for experts that have one, or fewer rows are stored than shall stay.
        """
        if not is_decomposed(model):
            check_decomposition(merged_layers(model), "low_rank_sparse", self.decomposition_options)
            return
        layers = decomposed_layers(model).values()
        if self.rank is not None:
            ranks = sorted({layer.layout()["rank"] for layer in layers})
            raise ValueError(
                f"rank is {self.rank}, but the experts are decomposed already, with rank {ranks[0]}. Leave it out."
            )
        stored = sum(sum(layer.layout()["num_rows"].values()) for layer in layers)
        total = count_rows(model)
        # Shares are rounded for each matrix of each expert when it is decomposed, and for all rows here.
        rounding = sum(len(layer.matrices) * layer.num_stored for layer in layers) / 2
        if self.final_keep_rows * total > stored + rounding:
            raise ValueError(
                f"final_keep_rows is {self.final_keep_rows}, but of {total} rows only {stored} are stored. "
                "Start from dense merged experts, or from experts decomposed with keep_rows=1."
            )

    def prepare(self, model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """Decompose the experts of a model if they are dense: the same function up to rounding; in place.

        Args:
            model: With its weights in the dtype of the training.
            dtypes: That of each parameter on disk.

        Returns:
            Those of the parameters that the model has now. New ones get that of the experts they replace.
        """
        self.check(model)
        if is_decomposed(model):
            return dict(dtypes)
        names = decompose_merged(model, **self.decomposition_options)
        of_layer = {name: next(d for path, d in dtypes.items() if path.startswith(f"{name}.")) for name in names}
        return {path: of_layer.get(path.rpartition(".")[0], dtypes.get(path)) for path, _ in model.named_parameters()}

    def describe(self, model: PreTrainedModel) -> dict[str, Any]:
        """What was asked, and the rows that a trained model has, ready for JSON."""
        rank = next(iter(decomposed_layers(model).values())).layout()["rank"]
        kept = sum(part.row.numel() for part in sparse_parts(model).values())
        return {**dataclasses.asdict(self), "rank": rank, "rows": count_rows(model), "kept_rows": kept}


def is_decomposed(model: nn.Module) -> bool:
    """Whether experts of a model are decomposed."""
    return any(isinstance(experts, LowRankSparseExperts) for experts in form_layers(model).values())


def report_sizes(report: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """A compression report with the sizes that its model has now.

    Args:
        report: Of the model before its experts were decomposed, or lost rows.
        model: In the dtypes that it is saved in.
    """
    forms = form_layers(model)
    layers = []
    for layer in report["layers"]:
        changed: dict[str, Any] = {}
        experts = next((form for name, form in forms.items() if is_same_layer(name, layer["layer"])), None)
        if experts is not None:
            now = form_sizes(experts)
            changed = {"parameters_after": now.expert_parameters, "bytes_after": now.expert_bytes}
            changed |= factor_sizes(experts.layout())
        layers.append({**layer, **changed})
    parameters, size = count(model)
    return {**report, "layers": layers, "total_parameters_after": parameters, "total_bytes_after": size}
