"""Generators of bad input, deterministic by seed: each yields cases for ``test_bad_input``."""
