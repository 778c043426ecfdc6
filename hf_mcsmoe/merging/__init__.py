"""How the members of one group become one expert. One file per operator.

An operator takes one matrix of all members at a time, (members (m, O, I) float32, importance (m,)) -> (O, I), neurons
aligned and the dominant expert first; or, with the trait takes="experts", whole experts: (members `ExpertWeights` of m
experts, importance) -> `ExpertWeights` of one.

It may ask for "members" (m,) int64, which of the N experts they are; "order" (N, I) or None, the alignment; "tokens"
(`LayerTokens` of the N original experts); "statistics"; and "weights" of all N experts, not aligned.
"""

from ..registry import Registry, import_submodules

MERGING = Registry("merging operator")

import_submodules(__name__, __path__)
