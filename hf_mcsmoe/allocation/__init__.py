"""(saliency per layer, total, least, most) -> experts per layer. One file per rule."""

from ..registry import Registry, import_submodules

ALLOCATION = Registry("allocation")

import_submodules(__name__, __path__)
