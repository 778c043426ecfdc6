"""Forms of experts: how the experts of one layer of a mapped checkpoint are stored. Add a file here for another."""

from ...registry import import_submodules
from .base import FORMS, ExpertForm, check_forms, form_layers

import_submodules(__name__, __path__)

__all__ = ["FORMS", "ExpertForm", "check_forms", "form_layers"]
