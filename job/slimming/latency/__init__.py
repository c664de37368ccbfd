"""Latency: how long a network and its layers take on this device, measured."""
