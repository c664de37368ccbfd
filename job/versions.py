"""Versions of what a result depends on."""

from __future__ import annotations

import platform
import tomllib
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "pillow")


def version() -> str:
    """Gammaslim's own version: of the installed package, or of the checkout that is run."""
    try:
        return metadata.version("gammaslim")
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[1] / "pyproject.toml"
        if not project.is_file():
            return "unknown"
        return str(tomllib.loads(project.read_text("utf-8"))["project"]["version"])


def versions() -> dict[str, str]:
    """Name -> version of Python and the packages that shape a result."""
    found = {"python": platform.python_version(), "gammaslim": version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout
            found[package] = "unknown"
    return found
