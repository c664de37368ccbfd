"""Check how W&B will run, before the job is queued."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from job.artifacts.json_records import from_json
from job.console import say
from job.errors import ConfigError, StorageError
from job.tracking import key_check

WANDB_WAIT = 60  # seconds for importing W&B and asking its server
NO_KEY = "no API key is configured: set WANDB_API_KEY, or run wandb login"
WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


@dataclass(frozen=True)
class WandbAnswer:
    """The result of `job.tracking.key_check`: the ``user`` of the key, or the problem.

    ``kind`` is "none" without a key, "key" for a rejected key, "server" for a failing server.
    """

    server: str = ""
    user: str | None = None
    kind: Literal["none", "key", "server"] | None = None
    problem: str = NO_KEY


def check_wandb(mode: str) -> str | None:
    """Print how W&B will run in ``--wandb MODE``; return a warning if it falls back to offline.

    Raises ConfigError or StorageError when ``online`` is requested but not possible.
    """
    given = os.environ.get("WANDB_MODE", "")
    if mode == "auto" and given and given not in ("online", "run"):
        say(f"W&B: {given}, by WANDB_MODE")
        return None
    if mode in ("off", "offline"):
        say(f"W&B: {mode}")
        return None
    answer = ask_wandb()
    if answer.user:
        say(f"W&B: online at {answer.server}, user {answer.user}")
        return None
    if mode == "online":
        raise (StorageError if answer.kind == "server" else ConfigError)(f"W&B: {answer.problem}")
    if answer.kind == "none" and not given:
        say(f"W&B: offline, since {answer.problem}")
        return None
    return f"W&B: {answer.problem}; the job would continue offline"


def ask_wandb() -> WandbAnswer:
    """Run `job.tracking.key_check` and return its result; skip it when there is no key to find."""
    homes = (Path(os.environ.get("NETRC") or "~/.netrc"), Path("~/_netrc"))
    if not any(os.environ.get(name) for name in WANDB_KEYS) and not any(
        path.expanduser().exists() for path in homes
    ):
        return WandbAnswer(kind="none")
    program = Path(key_check.__file__)
    command = [sys.executable, "-P", str(program)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=WANDB_WAIT, check=True
        )
        return from_json(WandbAnswer, json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        problem = f"the key check failed: {type(error).__name__}"
        return WandbAnswer(kind="server", problem=problem)
