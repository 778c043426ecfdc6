"""Mapped checkpoints in other runtimes."""
