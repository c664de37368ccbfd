"""Train and evaluate networks, one round at a time."""
