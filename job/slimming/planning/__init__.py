"""Which channels to cut: target, cost, policy, plan."""
