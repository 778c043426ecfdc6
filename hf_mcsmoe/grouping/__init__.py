"""(saliency, similarity, M, partitions) -> ExpertGroups. One file per rule.

A rule may ask for "statistics", "weights" and "tokens" (`LayerTokens` of the N original experts).
"""

from ..registry import Registry, import_submodules

GROUPING = Registry("grouping")

import_submodules(__name__, __path__)
