"""The W&B runs of a run directory: the id that all attempts share, and the unsynced folders."""

from __future__ import annotations

import os
import secrets
import shlex
import string
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.json_records import from_json, to_json
from job.artifacts.records import WandbRecord
from job.errors import GammaslimError
from job.files import read_json, write_json

if TYPE_CHECKING:
    from job.tracking.wandb_process import OfflineNames

ALPHABET = string.ascii_lowercase + string.digits


class Segments:
    """``RUN/wandb.json``: the W&B run's id, the number of attempts, and the unsynced folders.

    Online, all attempts are one W&B run. Offline, W&B cannot continue a run: each attempt is a
    separate run ``ID-ATTEMPT`` in a group named ``ID``.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / "wandb.json"
        stored = self._read()
        given = os.environ.get("WANDB_RUN_ID")
        self.id = given or stored.id or "".join(map(secrets.choice, [ALPHABET] * 8))
        self.attempt = stored.attempts + 1
        self.unsent = list(stored.unsent)
        self._write()

    def offline(self, name: str, *, instead: bool) -> OfflineNames:
        """Return the arguments of ``wandb.init`` for an offline run of this attempt.

        The user's environment variables take precedence. With ``instead`` the run replaces an
        online one and gets a different id.
        """
        numbered_name = name if self.attempt == 1 else f"{name}-{self.attempt}"
        use_given_id = os.environ.get("WANDB_RUN_ID") and self.attempt == 1 and not instead
        return {
            "id": self.id if use_given_id else f"{self.id}-{self.attempt}",
            "name": os.environ.get("WANDB_NAME") or numbered_name,
            "group": os.environ.get("WANDB_RUN_GROUP") or self.id,
        }

    def add_folder(self, folder: str) -> None:
        """Record ``folder``, which W&B writes to, as unsynced."""
        path = Path(folder).absolute()
        if path.is_relative_to(self.run.absolute()):
            path = path.relative_to(self.run.absolute())  # the run may be moved
        self.unsent.append(str(path))
        self._write()

    def mark_sent(self) -> None:
        """Record that the server has received the last folder."""
        self.unsent.pop()
        self._write()

    def sync_command(self) -> str | None:
        """Return the ``wandb sync`` command for the unsynced folders; None if there are none."""
        folders = [self.run / folder for folder in self.unsent]
        unsynced = [f for f in folders if f.is_dir() and not any(f.glob("*.synced"))]
        if not unsynced:
            return None
        online = [] if all(f.name.startswith("offline") for f in unsynced) else ["--include-online"]
        return shlex.join(["wandb", "sync", *online, *map(str, unsynced)])

    def _read(self) -> WandbRecord:
        try:
            return from_json(WandbRecord, read_json(self.path), lenient=True)
        except (OSError, ValueError, GammaslimError):
            return WandbRecord()

    def _write(self) -> None:
        record = WandbRecord(self.id, self.attempt, tuple(self.unsent))
        write_json(self.path, to_json(record))
