"""statistics of all layers -> (N,) bool for each: experts that no recipe may drop or merge. One file a rule."""

from ..registry import Registry, import_submodules

PROTECTION = Registry("protection")

import_submodules(__name__, __path__)
