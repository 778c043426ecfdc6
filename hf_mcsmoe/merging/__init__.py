"""How the members of one group become one expert. One file per operator.

An operator takes one matrix of all members at a time, (members (m, O, I) float32, importance (m,)) -> (O, I), neurons
aligned and the dominant expert first; or, with the trait takes="experts", whole experts: (members `ExpertWeights` of m
experts, importance) -> `ExpertWeights` of one; or, with takes="layer", the layer at once: (all N experts as the model
stores them, `ExpertGroups`, importance (N,)) -> `ExpertWeights` of the M, where dropped experts may have a say.

It may ask for "members" (m,) int64, which of the N experts they are (not where it takes the layer); "order" (N, I) or
None, the alignment; "tokens" (`LayerTokens` of the N original experts); "statistics"; "seed"; and "weights" of all N
experts, not aligned.

With the trait unites=True, and takes="experts", the expert that comes back has the neurons of all members one after
another, in their order; the recipe's selection says which of them stay.

The trait transfer, (weights of all N experts, groups, all options) -> (N, M) float64, tells router rules which share
of each expert went into each group; without it members went into theirs whole.
"""

from ..registry import Registry, import_submodules

MERGING = Registry("merging operator")

import_submodules(__name__, __path__)
