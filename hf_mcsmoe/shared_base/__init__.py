"""(experts, keep) -> what the N experts of a layer share, and what is left of each. One file per rule.

All experts stay, and so does the router. `experts` are `ExpertWeights` in the dtype of the model, `keep` in (0, 1) is
the share of the numbers of their matrices that the result may have. A rule gives a `SharedBase` or a
`SharedProjection`, with the size that `shared_budget` says.

A rule may ask for "importance" (N,) float64, the recipe's; "tokens", the kept calibration tokens as `LayerTokens`; and
"statistics".

Traits of a rule:
    shares: "base" or "projection": which of the two it gives.
    check: options -> None; raises ValueError for values that are never allowed.
"""

from ..registry import Registry, import_submodules

SHARED_BASE = Registry("shared base")

import_submodules(__name__, __path__)
