"""Files of a run: run directory, checkpoints, model cards, exports."""
