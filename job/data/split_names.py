"""Names of splits in folders, CSV columns and options, by their canonical name."""

from __future__ import annotations

SPLIT_NAMES = {
    "training": ("training", "train"),
    "validation": ("validation", "valid", "val", "dev"),
    "testing": ("testing", "test"),
    "evaluation": ("evaluation", "eval"),
}
CANONICAL = {alias: name for name, aliases in SPLIT_NAMES.items() for alias in aliases}
