"""(members (m, O, I), importance (m,)) -> (O, I). One file per operator."""

from ..registry import Registry, import_submodules

MERGING = Registry("merging operator")

import_submodules(__name__, __path__)
