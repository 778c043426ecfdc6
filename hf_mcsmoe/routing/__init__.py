"""groups -> Routing: how router slots reach the stored experts. One file per layout."""

from ..registry import Registry, import_submodules

ROUTING = Registry("routing")

import_submodules(__name__, __path__)
