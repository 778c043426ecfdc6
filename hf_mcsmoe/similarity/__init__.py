"""(statistics, weights) -> (N, N) float64: how alike two experts are. One file per measure.

A measure may ask for "tokens" (`LayerTokens` of the N original experts).
"""

from ..registry import Registry, import_submodules

SIMILARITY = Registry("similarity")

import_submodules(__name__, __path__)
