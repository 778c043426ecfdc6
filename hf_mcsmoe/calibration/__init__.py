"""Anything a user has, texts or tokens or data sets, as batches of calibration tokens."""

from .loading import Calibration, CalibrationBatch, load_calibration

__all__ = ["Calibration", "CalibrationBatch", "load_calibration"]
