"""Numerical problems that several steps share: they know matrices, and nothing of models."""
