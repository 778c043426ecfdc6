"""Ways of running a model over the calibration data."""
