"""Planning: how many channels each group keeps to meet a target, and what that costs."""
