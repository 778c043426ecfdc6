"""Mapped checkpoints as plain ones of the original architecture, for tools that know nothing of this package."""

from .checkpoint import export_checkpoint

__all__ = ["export_checkpoint"]
