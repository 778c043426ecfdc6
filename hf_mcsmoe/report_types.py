"""What a compression says of itself: plain numbers, ready for JSON. Offered by `types` as well."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerReport:
    """What compression did to one layer; plain numbers, ready for JSON."""

    layer: str
    num_slots: int
    num_experts_before: int
    num_experts_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    # |new - wanted output|^2 / |wanted output|^2 of routed experts on held-out tokens, with what a refitted shared
    # expert gives more than before; None: no tokens
    relative_error: float | None
    duplicate_share: float | None  # share of a held-out token's slots that hit an expert it already has
    unused_experts: int  # slots that no calibration token selected
    seconds: float
    group_of_expert: list[int]
    dominant_of_group: list[int]
    usage_frequency: list[float]
    widths: list[int]  # neurons of each of the M experts
    refit_error_before: float | None = None  # relative_error without the refit, the refit's own view; None: no refit
    refit_error_after: float | None = None  # with it; it was dropped where this is not less
    router_error_before: float | None = None  # relative_error with the rows of the dominants; None: no router rule
    router_error_after: float | None = None  # with the rule's rows; they were dropped where this is not less
    width_before: int | None = None  # neurons of each original expert; None: an older report
    rank: int | None = None  # of the low-rank factors of each matrix; None: dense experts
    sparse_rows: int | None = None  # rows of the sparse parts beside them, of all matrices and experts together
    shared_expert_refitted: bool = False  # the refit changed its last matrix too; no other field counts that expert
    protected_experts: list[int] = field(default_factory=list)  # of the N: neither dropped nor merged


def factor_sizes(layout: Mapping[str, Any]) -> dict[str, int | None]:
    """`rank` and `sparse_rows` of a layer's report, from its entry in the layout of a mapped checkpoint."""
    rows = layout.get("num_rows")
    return {"rank": layout.get("rank"), "sparse_rows": None if rows is None else sum(rows.values())}


@dataclass(frozen=True)
class Trial:
    """One recipe that the preset "auto" considered, and what it did to the model; plain values, ready for JSON."""

    preset: str
    changes: dict[str, Any]  # of the preset's steps
    kl: float | None = None  # KL(original || result), nats per held-out calibration token; None: not tried
    loss_increase: float | None = None  # nats per held-out calibration token
    seconds: float | None = None  # of copying, compressing and comparing
    skipped: str | None = None  # why it was not tried
    is_chosen: bool = False

    @property
    def label(self) -> str:
        """The preset and its changes: "m-smoe, refit=least_squares"."""
        return ", ".join([self.preset, *(f"{name}={value}" for name, value in self.changes.items())])


@dataclass(frozen=True)
class CompressionReport:
    """What one run of `compress_moe` did; written as `compression_report.json`.

    `format_version` rises when a reader of the version before would misunderstand a report. A field that only adds
    something has a default instead, which stands for "an older report does not say".
    """

    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    layers: list[LayerReport]
    base_model: str | None
    base_architecture: str
    total_parameters_before: int
    total_parameters_after: int
    total_bytes_before: int
    total_bytes_after: int
    seconds: float
    versions: dict[str, str]
    format_version: int = 1
    warnings: list[str] = field(default_factory=list)
    tried: list[Trial] = field(default_factory=list)  # by the preset "auto"; `recipe` is the chosen one
    active_parameters_before: int | None = None  # of a token, see `sizes.measure`; None: an older report
    active_parameters_after: int | None = None  # the same at most, on average where experts differ in width
    # Largest bytes in use since the process began: "process" (None where unknown) and each CUDA device, "cuda:0", ...
    peak_memory: dict[str, int | None] | None = None
    # With keep="fit": what was asked and why that share was chosen, see `fitting.Fit.to_dict`.
    fit: dict[str, Any] | None = None
    num_processes: int = 1  # that shared the calibration batches and the layers
    # By name, on the CPU, see `layer_record`: too large for JSON, in a file of their own. No part of equality.
    statistics: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON; without `statistics`."""
        values = asdict(replace(self, statistics={}))
        del values["statistics"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CompressionReport":
        """The report that `to_dict` gave, or that a file holds; keys that are no fields are left out.

        Raises:
            TypeError: A field without a default is missing.
        """
        known = _fields_of(cls, values)
        known["layers"] = [LayerReport(**_fields_of(LayerReport, layer)) for layer in known["layers"]]
        known["tried"] = [Trial(**_fields_of(Trial, trial)) for trial in known.get("tried", [])]
        return cls(**known)


def _fields_of(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = [one.name for one in fields(kind)]
    return {name: values[name] for name in names if name in values}
