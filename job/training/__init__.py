"""Training: one round of fine-tuning, evaluation, synchronised BatchNorm."""
