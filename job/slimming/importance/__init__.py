"""Importance criteria: which channels of a group matter."""
