"""What a run writes: run directory, checkpoints, model cards, exports."""
