"""Calibration images: batches, and the statistics of layer inputs over them."""
