"""(weights, groups) -> order (N, I): which neuron stands where before merging. One file per rule."""

from ..registry import Registry, import_submodules

ALIGNMENT = Registry("alignment")

import_submodules(__name__, __path__)
