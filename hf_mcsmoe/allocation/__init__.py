"""(saliency per layer, average budget per layer) -> experts per layer. One file per rule.

A rule may ask for "statistics_of_layer", a list of `LayerStatistics`, and "seed". One that does has the trait

    check_budget: (sizes N of the layers, average budgets, all options) -> None; raises ValueError for a budget that
        cannot be spent. Of other rules the function itself is asked, with equal saliencies.

A rule with the trait allots="neurons" is for recipes that select neurons and keep all experts: (costs of removal per
layer, share per layer) -> neurons per layer. It has the option `min_share`, what of its share a layer keeps at least.
"""

from ..registry import Registry, import_submodules

ALLOCATION = Registry("allocation")

import_submodules(__name__, __path__)
