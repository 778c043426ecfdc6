"""(saliency, similarity, M, partitions) -> ExpertGroups. One file per rule.

A rule may ask for "statistics", "weights", "tokens" (`LayerTokens` of the N original experts), "seed" and "layout",
and for "protected" (N,) bool, the experts that must stay alone: a rule that does not is given the others only.

Traits of an entry:
    drops: True for one that may leave experts in no group.
    reads_similarity: True for one that cannot do without.
    check_sizes: A function of (N, M, options) that raises ValueError for numbers of experts that it cannot group.
"""

from ..registry import Registry, import_submodules

GROUPING = Registry("grouping")

import_submodules(__name__, __path__)
