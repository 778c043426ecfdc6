"""Putting experts of another form than dense into a layer, and making them dense again."""

from typing import Any

from torch import Tensor

from ..expert_values import LowRankSparse, PackedExperts, SharedBase, SharedProjection
from ..types import MoeLayer
from .experts import attach_expert_map
from .forms import check_forms
from .forms.low_rank_sparse import LowRankSparseExperts, matrix_sizes
from .forms.ragged import RaggedExperts
from .forms.ranked_low_rank import RankedLowRankExperts
from .forms.shared_base import SharedBaseExperts
from .forms.shared_projection import SharedProjectionExperts


def install_ragged(layer: MoeLayer, packed: PackedExperts, slot_map: Tensor, layout: dict[str, Any]) -> None:
    """Replace a layer's experts by M experts of different widths behind a map; in place.

    Args:
        layer: The layer as found in the original model.
        packed: The new experts; they get the dtype and device of the old ones.
        slot_map: (N,) int64 in [-1, M).
        layout: See `attach_expert_map`; `form` and `num_neurons` are added.

    Raises:
        ValueError: The layer cannot have this form, or the experts do not fit it.
    """
    check_forms(layer)
    missing = [name for name in needed_tensors(layer) if getattr(packed, name) is None]
    if missing or packed.up.shape[1] != layer.hidden_size or packed.num_experts != layout["num_experts"]:
        raise ValueError(
            f"{layer.name!r} needs {layout['num_experts']} experts of hidden size {layer.hidden_size} with "
            f"{needed_tensors(layer)}, got {packed.num_experts} of {packed.up.shape[1]} without {missing}."
        )
    layout |= RaggedExperts.install(layer, packed)
    attach_expert_map(layer, layout, slot_map)


def install_low_rank_sparse(
    layer: MoeLayer,
    factors: dict[str, list[LowRankSparse]],
    biases: dict[str, Tensor],
    slot_map: Tensor,
    layout: dict[str, Any],
) -> None:
    """Replace a layer's experts by M decomposed ones behind a map; in place.

    Args:
        layer: The layer as found in the original model.
        factors: For each matrix ("gate" if the family has it, "up", "down"): that of each of the M experts, all of
            one rank. They get the dtype and device of the old experts.
        biases: For each matrix (M, O), where the family has biases; else empty.
        slot_map: (N,) int64 in [-1, M).
        layout: See `attach_expert_map`; `form`, `rank` and `num_rows` are added.

    Raises:
        ValueError: The layer cannot have this form, or the factors do not fit it.
    """
    check_forms(layer)
    check_factors(layer, factors, biases, layout["num_experts"])
    layout |= LowRankSparseExperts.install(layer, factors, biases)
    attach_expert_map(layer, layout, slot_map)


def install_ranked_low_rank(
    layer: MoeLayer,
    factors: dict[str, list[LowRankSparse]],
    biases: dict[str, Tensor],
    slot_map: Tensor,
    layout: dict[str, Any],
) -> None:
    """Replace a layer's experts by M of low ranks that may differ, without kept rows, behind a map; in place.

    Args:
        layer: The layer as found in the original model.
        factors: As for `install_low_rank_sparse`, of any ranks.
        biases: As there.
        slot_map: (N,) int64 in [-1, M).
        layout: See `attach_expert_map`; `form` and `num_ranks` are added.

    Raises:
        ValueError: The layer cannot have this form, or the factors do not fit it.
    """
    check_forms(layer)
    check_factors(layer, factors, biases, layout["num_experts"], one_rank=False)
    if any(one.rows.numel() for of_expert in factors.values() for one in of_expert):
        raise ValueError(f"{layer.name!r} was given kept rows, which experts of different ranks have no place for.")
    layout |= RankedLowRankExperts.install(layer, factors, biases)
    attach_expert_map(layer, layout, slot_map)


def install_shared(
    layer: MoeLayer, shared: SharedBase | SharedProjection, slot_map: Tensor, layout: dict[str, Any]
) -> None:
    """Replace a layer's experts by M that share a base or projections, behind a map; in place.

    Args:
        layer: The layer as found in the original model.
        shared: The new experts; they get the dtype and device of the old ones.
        slot_map: (N,) int64 in [-1, M).
        layout: See `attach_expert_map`; `form` and its sizes are added.

    Raises:
        ValueError: The layer cannot have this form, or the experts do not fit it.
    """
    check_forms(layer)
    check_linear_output(layer)
    if isinstance(shared, SharedBase):
        check_factors(layer, shared.factors, shared.biases, layout["num_experts"])
        layout |= SharedBaseExperts.install_shared(layer, shared)
    else:
        sizes = matrix_sizes(layer)
        shape = (layout["num_experts"], layer.intermediate_size, layer.hidden_size)
        given = (*shared.latent["up"].shape[:2], shared.inward.shape[1])
        has_biases = set(shared.biases) == (set(sizes) if layer.format.has_bias else set())
        if given != shape or set(shared.latent) != set(sizes) or not has_biases:
            raise ValueError(
                f"{layer.name!r} needs {shape[0]} experts of width {shape[1]} and hidden size {shape[2]} with "
                f"{sorted(sizes)}, got {given} with {sorted(shared.latent)} and biases of {sorted(shared.biases)}."
            )
        layout |= SharedProjectionExperts.install(layer, shared)
    attach_expert_map(layer, layout, slot_map)


def check_linear_output(layer: MoeLayer) -> None:
    """Refuse experts whose outputs cannot be summed before they are multiplied with what all of them share.

    Raises:
        ValueError: With the reason.
    """
    norm = getattr(layer.experts, "has_post_expert_norm", False)
    dropout = getattr(layer.experts, "moe_token_dropout", 0)
    if norm or dropout:
        raise ValueError(
            f"The experts of {layer.name!r} cannot share a part: their outputs are "
            f"{'normalised' if norm else 'dropped at random'} one by one. Use a recipe without shared_base."
        )


def check_factors(
    layer: MoeLayer,
    factors: dict[str, list[LowRankSparse]],
    biases: dict[str, Tensor],
    num_experts: int,
    *,
    one_rank: bool = True,
) -> None:
    """Raise ValueError for factors of `num_experts` experts that do not fit a layer."""
    sizes = matrix_sizes(layer)
    named_biases = set(sizes) if layer.format.has_bias else set()
    if set(factors) != set(sizes) or set(biases) != named_biases:
        raise ValueError(
            f"{layer.name!r} needs factors of {sorted(sizes)} and biases of {sorted(named_biases)}, "
            f"got {sorted(factors)} and {sorted(biases)}."
        )
    ranks = {one.rank for of_expert in factors.values() for one in of_expert}
    for matrix, of_expert in factors.items():
        shapes = {one.shape for one in of_expert}
        if len(of_expert) != num_experts or shapes != {sizes[matrix]} or (one_rank and len(ranks) != 1):
            raise ValueError(
                f"{matrix} of {layer.name!r} needs {num_experts} factors of shape {sizes[matrix]} and one rank, "
                f"got {len(of_expert)} of {sorted(shapes)} with ranks {sorted(ranks)}."
            )


def needed_tensors(layer: MoeLayer) -> list[str]:
    """Fields of `PackedExperts` that experts of a layer must have."""
    names = ["gate", "up", "down"] if layer.format.has_gate else ["up", "down"]
    return [*names, *(f"{name}_bias" for name in names)] if layer.format.has_bias else names
