"""Training one layer alone to give what the original layer gave. One file per rule."""

from ..registry import Registry, import_submodules

MATCHING = Registry("matching")

import_submodules(__name__, __path__)
