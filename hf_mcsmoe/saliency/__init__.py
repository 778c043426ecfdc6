"""(statistics, weights) -> (N,) float64: how much each expert matters. One file per score."""

from ..registry import Registry, import_submodules

SALIENCY = Registry("saliency")

import_submodules(__name__, __path__)
