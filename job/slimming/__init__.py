"""Slimming: channel groups, importance, plan, surgery, verification, compensation."""
