"""Gammaslim: makes trained CNNs smaller and faster by slimming on the γ of their BatchNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.artifact import load as load
    from job.slimming.api import slim as slim

__all__ = ["load", "slim"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import, and `gammaslim --help` must not wait for it
    if name == "load":
        from job.artifact import load

        return load
    if name == "slim":
        from job.slimming.api import slim

        return slim
    raise AttributeError(f"module 'job' has no attribute {name!r}")
