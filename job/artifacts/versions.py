"""Versions of the packages that a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

from job import __version__

PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "pillow")


def package_versions() -> dict[str, str]:
    """Return name -> version of Python, Gammaslim and the packages that a result depends on."""
    known = {"python": platform.python_version(), "gammaslim": __version__}
    for package in PACKAGES:
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout
            known[package] = "unknown"
    return known
