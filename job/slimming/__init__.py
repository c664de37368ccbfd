"""Slimming: channel groups, importance, plan, surgery, verification, cost."""
