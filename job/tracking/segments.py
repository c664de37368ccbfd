"""Which W&B run a run directory has, over all its attempts, and what still has to be synced."""

from __future__ import annotations

import os
import secrets
import shlex
import string
from pathlib import Path
from typing import Any

from job.errors import GammaslimError
from job.files import read_json, write_json

ALPHABET = string.ascii_lowercase + string.digits


class Segments:
    """``RUN/wandb.json``: the W&B run's id, how many attempts there were, folders not yet sent.

    Online, all attempts are one W&B run. Offline W&B cannot go on with a run, so each attempt is
    one of its own, ``ID-ATTEMPT``, in a group named ``ID``.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / "wandb.json"
        stored = self._read()
        given = os.environ.get("WANDB_RUN_ID")
        self.id = given or str(stored.get("id") or "".join(map(secrets.choice, [ALPHABET] * 8)))
        self.attempt = int(stored.get("attempts", 0)) + 1
        self.unsent = [str(folder) for folder in stored.get("unsent", [])]
        self._write()

    def offline(self, name: str, *, instead: bool) -> dict[str, str]:
        """Arguments of ``wandb.init`` for an offline run of this attempt; the user's own win.

        ``instead``: of an online run, whose id it must not take.
        """
        numbered = name if self.attempt == 1 else f"{name}-{self.attempt}"
        as_given = os.environ.get("WANDB_RUN_ID") and self.attempt == 1 and not instead
        return {
            "id": self.id if as_given else f"{self.id}-{self.attempt}",
            "name": os.environ.get("WANDB_NAME") or numbered,
            "group": os.environ.get("WANDB_RUN_GROUP") or self.id,
        }

    def begun(self, folder: str) -> None:
        """Note that W&B writes into ``folder``."""
        path = Path(folder).absolute()
        if path.is_relative_to(self.run.absolute()):
            path = path.relative_to(self.run.absolute())  # the run may be moved
        self.unsent.append(str(path))
        self._write()

    def sent(self) -> None:
        """Note that the last folder's content has arrived."""
        self.unsent.pop()
        self._write()

    def sync_command(self) -> str | None:
        """The ``wandb sync`` line for what is not yet on the server; None when there is nothing."""
        folders = [self.run / folder for folder in self.unsent]
        left = [f for f in folders if f.is_dir() and not any(f.glob("*.synced"))]
        if not left:
            return None
        online = [] if all(f.name.startswith("offline") for f in left) else ["--include-online"]
        return shlex.join(["wandb", "sync", *online, *map(str, left)])

    def _read(self) -> dict[str, Any]:
        try:
            stored = read_json(self.path)
            int(stored.get("attempts", 0)), list(stored.get("unsent", []))
        except (OSError, ValueError, TypeError, AttributeError, GammaslimError):
            return {}
        return dict(stored)

    def _write(self) -> None:
        content = {"id": self.id, "attempts": self.attempt, "unsent": self.unsent}
        write_json(self.path, content)
