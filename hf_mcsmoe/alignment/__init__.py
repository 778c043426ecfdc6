"""(weights, groups) -> order (N, I): which neuron stands where before merging. One file per rule.

A rule may ask for "statistics" and "tokens" (`LayerTokens` of the N original experts).
"""

from ..registry import Registry, import_submodules

ALIGNMENT = Registry("alignment")

import_submodules(__name__, __path__)
