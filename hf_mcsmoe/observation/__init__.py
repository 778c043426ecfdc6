"""What layers did on calibration tokens, as values that steps read."""
