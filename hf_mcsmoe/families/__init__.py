"""Where each model keeps router and experts: the only code that knows module names. One file per way of writing it."""

from ..registry import import_submodules
from .base import FAMILIES, MoeFamily, find_layers, tied_layers
from .forward import forward_call, reading_part
from .refused import reason_against

import_submodules(__name__, __path__)

__all__ = ["FAMILIES", "MoeFamily", "find_layers", "forward_call", "reading_part", "reason_against", "tied_layers"]
