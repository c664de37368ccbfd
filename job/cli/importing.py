"""Import of what a command needs: torch takes a second, and is imported once it is needed."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from job.distributed.signals import starting

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def importing() -> Iterator[None]:
    """Import modules, including torch; a stop request ends this process immediately.

    Garbage collection is disabled during the import, where it would take a sixth of the time. The
    objects that exist afterwards are frozen: each later collection would spend 0.2 s on them.
    """
    first = "torch" not in sys.modules
    with starting():
        if first:
            gc.disable()
        try:
            yield
        finally:
            if first:
                gc.freeze()
                gc.enable()
