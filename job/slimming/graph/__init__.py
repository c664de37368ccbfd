"""Channel groups: which channels of which layers must be cut together."""
