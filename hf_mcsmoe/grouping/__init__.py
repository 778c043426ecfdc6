"""(saliency, similarity, M, partitions) -> ExpertGroups. One file per rule.

A rule may ask for "statistics", "weights" and "tokens" (`LayerTokens` of the N original experts), for the "layout",
and for "protected" (N,) bool, the experts that must stay alone: a rule that does not is given the others only. Trait
`drops`: experts may end up in no group.
"""

from ..registry import Registry, import_submodules

GROUPING = Registry("grouping")

import_submodules(__name__, __path__)
