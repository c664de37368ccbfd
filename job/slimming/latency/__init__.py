"""Latency: measured times of networks and their layers on this device."""
