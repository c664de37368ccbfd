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
    """Import modules, torch among them; a request to stop ends this process.

    Garbage collections would take a sixth of the time, and 0.2 s each later: there are none here,
    and later ones do not visit what the modules have made.
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
