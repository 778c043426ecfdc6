"""(matrix (O, I), Gram of its inputs (I, I) or None, row scores or None) -> LowRankSparse. One file per rule."""

from ..registry import Registry, import_submodules

DECOMPOSITION = Registry("decomposition")

import_submodules(__name__, __path__)
