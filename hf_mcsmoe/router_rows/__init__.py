"""(rows (N, D_r), groups) -> (M, D_r): the rows of a router that is cut to the M groups of the native layout.

The logit of a slot is the product of its row with what the router is given; a bias is the last entry of its row, which
is multiplied with 1. Rows are float64 (float32 where the device has none). What else a router keeps for each slot
(correction biases, scales) stays that of the dominant expert.

A rule may ask for "tokens", a list of (t, D_r) float32: what the router was given for the kept calibration tokens; and
"transfer" (N, M) float64: the share of expert e that went into group m, 1 for its members unless the merge says more.

Traits of a rule:
    softmax: True for one that is only defined where the router's weights come from a softmax over all logits.
    check: options -> None; raises ValueError for values that no router could be given.
"""

from ..registry import Registry, import_submodules

ROUTER_ROWS = Registry("router rule")

import_submodules(__name__, __path__)
