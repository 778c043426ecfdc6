"""What a preset is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method: its recipe, and where it comes from."""

    paper: str
    url: str
    notes: str
    recipe: Mapping[str, Any]
