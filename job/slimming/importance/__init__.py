"""Importance criteria, which rank the channels of a group."""
