"""(experts, Gram of each expert's gated neurons) -> saliency (P,) of every neuron. One file per rule."""

from ..registry import Registry, import_submodules

SELECTION = Registry("selection")

import_submodules(__name__, __path__)
