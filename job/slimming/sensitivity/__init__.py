"""Sensitivity: the loss of a network's outputs when one channel group is cut."""
