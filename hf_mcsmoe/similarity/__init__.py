"""(statistics, weights) -> (N, N) float64: how alike two experts are. One file per measure."""

from ..registry import Registry, import_submodules

SIMILARITY = Registry("similarity")

import_submodules(__name__, __path__)
