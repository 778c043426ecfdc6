"""statistics -> (N, D) float64: what takes the place of an expert that is dropped. One file per rule.

In the mapped layout the slot of a dropped expert adds its gate times this vector.
"""

from ..registry import Registry, import_submodules

CONSTANTS = Registry("constant")

import_submodules(__name__, __path__)
