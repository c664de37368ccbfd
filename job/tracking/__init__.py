"""Log the numbers of a run to a Weights & Biases dashboard."""
