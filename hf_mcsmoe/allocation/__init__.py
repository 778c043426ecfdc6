"""(saliency per layer, budget per layer) -> experts per layer. One file per rule.

A rule may ask for "statistics" (`LayerStatistics` of each layer) and "seed". Only one that asks for nothing is tried
before the model runs, so one that asks must be able to spend any budget.
"""

from ..registry import Registry, import_submodules

ALLOCATION = Registry("allocation")

import_submodules(__name__, __path__)
