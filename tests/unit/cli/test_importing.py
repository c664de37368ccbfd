"""Modules are imported without garbage collections, and left out of later ones."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc
from job.cli.importing import importing
with importing():
    import torch
    print(gc.isenabled())
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
gc.unfreeze()
with importing():  # torch is there: nothing to import, the caller's objects are left alone
    print(gc.isenabled())
print(gc.get_freeze_count())
"""


def test_what_a_command_imports_is_left_out_of_collections() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "True", "True", "0"]
