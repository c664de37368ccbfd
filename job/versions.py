"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("gammaslim", "torch", "torchvision", "accelerate", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Name -> version of Python and the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found
