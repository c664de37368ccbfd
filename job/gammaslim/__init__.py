"""Make trained CNNs smaller and faster: slim by BatchNorm γ.

    narrow, plan = gammaslim.slim(network, torch.rand(1, 3, 224, 224), target="macs=0.5")
    print(plan)
    gammaslim.save(narrow, "slim", plan=plan)
    narrow = gammaslim.load("slim")

These are the objects of the package ``job``, and ``python -m gammaslim`` is its command line.
"""

from typing import TYPE_CHECKING, Any

import job
from job import ConfigError as ConfigError
from job import DataError as DataError
from job import GammaslimError as GammaslimError
from job import InputNotFound as InputNotFound
from job import OutputError as OutputError
from job import StopRequest as StopRequest
from job import StorageError as StorageError
from job import UsageError as UsageError
from job import __all__ as __all__

if TYPE_CHECKING:
    from job import Plan as Plan
    from job import Sensitivity as Sensitivity
    from job import __version__ as __version__
    from job import apply as apply
    from job import load as load
    from job import new_optimizer as new_optimizer
    from job import save as save
    from job import sensitivity as sensitivity
    from job import slim as slim


if not TYPE_CHECKING:  # type checkers see the imports above, and report other names

    def __getattr__(name: str) -> Any:
        """Pass on the names that ``job`` imports on first use."""
        if name not in __all__:
            raise AttributeError(f"module 'gammaslim' has no attribute {name!r}")
        return getattr(job, name)


def __dir__() -> list[str]:
    return list(__all__)
