"""Training: one round of fine-tuning, evaluation, what several processes need."""
