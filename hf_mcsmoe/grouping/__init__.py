"""(saliency, similarity, M, partitions) -> ExpertGroups. One file per rule."""

from ..registry import Registry, import_submodules

GROUPING = Registry("grouping")

import_submodules(__name__, __path__)
