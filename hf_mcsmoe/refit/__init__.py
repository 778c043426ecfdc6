"""(features and targets of a layer, experts) -> new down projections. One file per rule."""

from ..registry import Registry, import_submodules

REFIT = Registry("refit")

import_submodules(__name__, __path__)
