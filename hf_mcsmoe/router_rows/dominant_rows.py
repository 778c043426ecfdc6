"""Every group keeps the row of its dominant expert."""

from torch import Tensor

from ..router_rows import ROUTER_ROWS
from ..types import ExpertGroups


@ROUTER_ROWS.register("dominant_rows")
def dominant_rows(rows: Tensor, groups: ExpertGroups) -> Tensor:
    """What a recipe without a router rule does too: the rows of the dominants, (M, D_r), bit by bit.

    Args:
        rows: Of all slots, (N, D_r).
        groups: Which slots became one.
    """
    return rows[groups.dominant_of_group.to(rows.device)]
