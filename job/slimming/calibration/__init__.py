"""Calibration batches, and the statistics of activations over them."""
