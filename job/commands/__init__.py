"""What is done with a model: evaluate, predict, inspect, slim, export."""
