"""Sensitivity: what the outputs of a network lose when one channel group is cut."""
