"""Presets: methods as recipes, published ones and ours. Data: each file of the folder holds a table `PRESETS`."""

import importlib
import pkgutil

from .preset import Preset

PRESETS: dict[str, Preset] = {}
for _module in pkgutil.iter_modules(__path__):
    PRESETS |= getattr(importlib.import_module(f"{__name__}.{_module.name}"), "PRESETS", {})

__all__ = ["PRESETS", "Preset"]
