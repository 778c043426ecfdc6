"""(matrix (O, I), Gram of its inputs (I, I) or None, row scores or None) -> LowRankSparse. One file per rule.

Trait of a rule: ranked=True for one whose rank differs by expert; the pipeline gives it as the option "rank".
"""

from ..registry import Registry, import_submodules

DECOMPOSITION = Registry("decomposition")

import_submodules(__name__, __path__)
