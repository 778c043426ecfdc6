"""experts (P neurons) -> saliency (P,) of every neuron. One file per rule.

A rule may ask for "grams" (the Gram of each expert's gated neurons on the kept tokens), "sums" (`FeatureSums` of all
neurons, None where they are too many), "budget" (neurons that stay, and how many each expert keeps at least),
"statistics" of the N original experts, and "experts_kept" int64, which of these the experts are: (M,), or for unions
the original expert of each piece of I neurons, in order.
"""

from ..registry import Registry, import_submodules

SELECTION = Registry("selection")

import_submodules(__name__, __path__)
