"""What went into an expert brings its share of the router row along."""

import torch
from torch import Tensor

from ..router_rows import ROUTER_ROWS
from ..types import ExpertGroups


@ROUTER_ROWS.register("proportional_transfer")
def proportional_transfer(rows: Tensor, groups: ExpertGroups, *, transfer: Tensor) -> Tensor:
    """row_m = row of the dominant + sum over the other experts e of (share of e that went into m) * row_e.

    The router step of DERN (2025, https://arxiv.org/abs/2509.10377), of which we know a third party's
    implementation only: there the share is the number of e's neurons that went to the expert, over the width.
    A member that was merged whole has share 1, a dropped expert 0. Sums of rows make logits larger, so a layer's
    weights become more peaked; the pipeline keeps them only where held-out tokens are better off.

    Args:
        rows: Of all slots, (N, D_r).
        groups: Which slots became one.
        transfer: Shares in [0, 1], (N, M); what it says of dominants is not read.

    Returns:
        (M, D_r).
    """
    dominant = groups.dominant_of_group.to(rows.device)
    shares = transfer.to(rows).index_fill(0, dominant, 0.0)
    return rows[dominant] + torch.einsum("nm,nd->md", shares, rows)
