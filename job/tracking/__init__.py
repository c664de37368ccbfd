"""Weights & Biases: the numbers of a run on a dashboard."""
