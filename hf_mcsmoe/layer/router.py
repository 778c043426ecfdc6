"""The router of a layer is cut to the groups of the native layout, and its rows become what the recipe says."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..executors.in_memory import Collected
from ..modeling.experts import install_native
from ..observation.kept_features import KeptFeatures
from ..observation.layer_inputs import relative_error, routed_output
from ..recipe import Recipe
from ..router_access import find_rows, read_rows, router_inputs, write_rows
from ..router_rows import ROUTER_ROWS
from ..types import ExpertGroups, MoeLayer
from .fit import routed_tokens, with_answers
from .merging import MergedLayer


@dataclass(frozen=True)
class RouterErrors:
    """The layer's relative squared error on held-out tokens with two sets of router rows; None: no tokens."""

    dominant_rows: float | None
    rule: float | None

    @property
    def is_kept(self) -> bool:
        """Whether the rows of the rule stay: they lower the error, or nothing is known of it."""
        return self.dominant_rows is None or self.rule < self.dominant_rows


@torch.no_grad()
def cut_router(
    layer: MoeLayer, recipe: Recipe, merged: MergedLayer, collected: Collected, before: list[Tensor]
) -> RouterErrors | None:
    """Install M experts and a router of M rows; in place.

    The rows of the recipe's rule stay only if they lower the error of the layer's output on held-out tokens, beside
    the rows of the dominant experts and before any selection and refit.

    Args:
        layer: As found, with N slots; M < N.
        recipe: `router` and its options.
        merged: Of the native layout.
        collected: What the layer was given.
        before: The output of the original layer for the held-out tokens.

    Returns:
        What the held-out tokens say; None without a rule.
    """
    rows, groups = merged.routing.rows, merged.groups
    if recipe.router is None:
        install_native(layer, merged.parameters, rows, groups.group_of_expert)
        return None
    place = find_rows(layer, layer.num_slots)
    old = read_rows(layer, place, layer.num_slots)
    supply = {
        "tokens": lambda: router_inputs(layer, place, collected.calibration),
        "transfer": lambda: membership(groups) if merged.transfer is None else merged.transfer,
    }
    new = ROUTER_ROWS.call(recipe.router, old, groups, options=recipe.router_options, supply=supply)
    install_native(layer, merged.parameters, rows, groups.group_of_expert)
    first = error_of_rows(layer, merged, collected, before)
    write_rows(layer, place, new)
    errors = RouterErrors(first, error_of_rows(layer, merged, collected, before))
    if not errors.is_kept:
        write_rows(layer, place, old[groups.dominant_of_group.to(old.device)])
    return errors


def error_of_rows(layer: MoeLayer, merged: MergedLayer, collected: Collected, before: list[Tensor]) -> float | None:
    """The layer's relative squared error on held-out tokens with the router rows that it has now."""
    if merged.unions is None:
        return relative_error(before, routed_output(layer, collected.held_out, reroute=True))
    # The module holds the dominant experts alone.
    tokens = routed_tokens(layer, collected.held_out, torch.eye(merged.groups.num_groups), before, reroute=True)
    answers = with_answers(KeptFeatures(merged.unions, layer.family.activation(layer), tokens))
    return relative_error(before, [batch.targets for batch in answers])


def membership(groups: ExpertGroups) -> Tensor:
    """1 where an expert is a member of a group, (N, M) float64; rows of zeros for dropped experts."""
    experts = (groups.group_of_expert >= 0).nonzero().flatten()
    shares = torch.zeros(groups.group_of_expert.numel(), groups.num_groups, dtype=torch.float64)
    shares[experts, groups.group_of_expert[experts]] = 1.0
    return shares
