"""Channel graph: the trace of a network, and the channels that must be cut together."""
