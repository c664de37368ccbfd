"""How W&B will run, checked before the job waits in a queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from job.console import say
from job.errors import ConfigError, StorageError
from job.tracking import key_check

WANDB_WAIT = 60  # seconds for importing W&B and asking its server
NO_KEY = "no API key is configured: set WANDB_API_KEY, or run wandb login"
WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def check_wandb(mode: str) -> str | None:
    """Say how W&B will run in ``--wandb MODE``; return a warning where it falls back to offline.

    Raises ConfigError or StorageError where ``online`` is asked for and is not possible.
    """
    given = os.environ.get("WANDB_MODE", "")
    if mode == "auto" and given and given not in ("online", "run"):
        say(f"W&B: {given}, by WANDB_MODE")
        return None
    if mode in ("off", "offline"):
        say(f"W&B: {mode}")
        return None
    answer = ask_wandb()
    if user := answer.get("user"):
        say(f"W&B: online at {answer['server']}, user {user}")
        return None
    kind, problem = answer["kind"], answer.get("problem", NO_KEY)
    if mode == "online":
        raise (StorageError if kind == "server" else ConfigError)(f"W&B: {problem}")
    if kind == "none" and not given:
        say(f"W&B: offline, since {problem}")
        return None
    return f"W&B: {problem}; the job would continue offline"


def ask_wandb() -> dict[str, Any]:
    """Return what `job.tracking.key_check` finds; it is not run where it could find no key."""
    homes = (Path(os.environ.get("NETRC") or "~/.netrc"), Path("~/_netrc"))
    if not any(os.environ.get(name) for name in WANDB_KEYS) and not any(
        path.expanduser().exists() for path in homes
    ):
        return {"kind": "none"}
    program = Path(key_check.__file__)
    command = [sys.executable, "-P", str(program)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=WANDB_WAIT, check=True
        )
        return dict(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"kind": "server", "problem": f"it cannot be asked: {type(error).__name__}"}
