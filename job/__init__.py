"""Make trained CNNs smaller and faster: slim by BatchNorm γ.

    narrow, plan = job.slim(network, torch.rand(1, 3, 224, 224), target="macs=0.5")
    print(plan)
    job.save(narrow, "slim", plan=plan)
    narrow = job.load("slim")

The installed package ``gammaslim`` has the same names for the same objects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from job.errors import (
    ConfigError,
    DataError,
    GammaslimError,
    InputNotFound,
    OutputError,
    StopRequest,
    StorageError,
    UsageError,
)

if TYPE_CHECKING:
    from job.artifacts.saving import load, save
    from job.slimming.api import sensitivity, slim
    from job.slimming.application import apply
    from job.slimming.loop_optimizer import new_optimizer
    from job.slimming.planning.plan import Plan
    from job.slimming.sensitivity.record import Sensitivity

__version__ = "0.1.0"  # pyproject.toml reads it from here

# imported on first use: torch takes a second, and `gammaslim --help` must not wait for it
LAZY = {
    "apply": "job.slimming.application",
    "load": "job.artifacts.saving",
    "new_optimizer": "job.slimming.loop_optimizer",
    "save": "job.artifacts.saving",
    "sensitivity": "job.slimming.api",
    "slim": "job.slimming.api",
    "Plan": "job.slimming.planning.plan",
    "Sensitivity": "job.slimming.sensitivity.record",
}
__all__ = [
    "ConfigError",
    "DataError",
    "GammaslimError",
    "InputNotFound",
    "OutputError",
    "Plan",
    "Sensitivity",
    "StopRequest",
    "StorageError",
    "UsageError",
    "__version__",
    "apply",
    "load",
    "new_optimizer",
    "save",
    "sensitivity",
    "slim",
]


if not TYPE_CHECKING:  # type checkers see the imports above, and report other names

    def __getattr__(name: str) -> Any:
        """Import a name of LAZY on first use."""
        if name not in LAZY:
            raise AttributeError(f"module 'job' has no attribute {name!r}")
        return getattr(importlib.import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
