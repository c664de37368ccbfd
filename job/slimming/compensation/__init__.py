"""Compensation: weights of the narrow network that make up for removed channels."""
