"""Planning: the number of channels that each group keeps to meet a target, and the costs."""
