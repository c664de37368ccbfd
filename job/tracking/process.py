"""The process that talks to W&B: what W&B waits for, prints, or hooks into stays in here.

Started by job.tracking.tracker as a file: it needs nothing of the package. Reads JSON lines: how
to begin, then ``log``, ``round`` and ``finish`` events. Writes JSON lines: ``begun`` or
``failed``, then ``warning``. All settings are W&B's own environment variables.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

LAST_WORDS = 45.0  # seconds after the last event in which the process ends, whatever W&B does
UPLOADS = 3.0  # of them, for what W&B's server is still to say about artifacts


def main() -> None:
    """Begin a W&B run, tell it what the job says, and end it when the job does."""
    orders, replies = _take_pipes()
    order = json.loads(orders.readline())
    sys.argv = order["argv"]  # W&B shows it as the run's command
    try:
        run = _begin(order)
    except Exception as error:  # wandb raises its own, requests' and protobuf's errors
        _reply(replies, failed=_reason(error), mode=order["mode"])
        os._exit(1)
    folder = os.path.dirname(run.dir)  # noqa: PTH120  (as it was given: "." is kept)
    _reply(replies, begun=folder, mode=order["mode"], url=run.url or "")
    follower = Follower(run, replies)
    for line in orders:
        event = json.loads(line)
        if event.pop("event") == "finish":
            follower.finish(**event)
            break
        follower.follow(**event)
    else:  # the job was killed
        follower.finish({}, exit_code=1, again=False)


class Follower:
    """Hands events to the W&B run. What fails is said once, and the rest goes on."""

    def __init__(self, run: Any, replies: IO[str]) -> None:
        self.run, self.replies = run, replies
        self.said = False
        # W&B asks its server about each artifact, a table too, and waits: numbers must not
        self.uploads = ThreadPoolExecutor(1)

    def follow(self, values: dict[str, Any], **more: Any) -> None:
        """Log ``values``; of a round also histograms (counts, edges), a table and the model."""
        histograms = more.get("histograms", {})
        self._try(lambda: self.run.log(values | {k: _histogram(*h) for k, h in histograms.items()}))
        for name, table in more.get("tables", {}).items():
            self.uploads.submit(self._try, partial(self._log_table, name, *table))
        if model := more.get("model"):
            self.uploads.submit(self._try, partial(self._upload, **model))

    def finish(self, summary: dict[str, Any], exit_code: int, again: bool) -> None:
        """End the W&B run; ``again``: the job will be run again, W&B shows it as preempted."""
        last = threading.Timer(LAST_WORDS, os._exit, (1,))
        last.daemon = True
        last.start()
        with suppress(TimeoutError):
            waiting = LAST_WORDS if self.run.offline else UPLOADS
            self.uploads.submit(lambda: None).result(waiting)
        self._try(lambda: self.run.summary.update(summary))
        if again:
            self._try(self.run.mark_preempting)
        self._try(lambda: self.run.finish(exit_code=exit_code))

    def _log_table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        import wandb

        self.run.log({name: wandb.Table(columns=columns, data=rows)})

    def _upload(self, name: str, folder: str, alias: str, metadata: dict[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(name, "model", metadata=metadata)
        for file in sorted(Path(folder).iterdir()):
            artifact.add_file(str(file))
        self.run.log_artifact(artifact, aliases=[alias])

    def _try(self, call: Any) -> None:
        try:
            call()
        except Exception as error:  # see main
            if not self.said:
                _reply(self.replies, warning=_reason(error))
            self.said = True


def _begin(order: dict[str, Any]) -> Any:
    """The W&B run; ``order["mode"]`` becomes what ``auto`` means here."""
    import wandb

    if order["mode"] == "auto":
        order["mode"] = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        order["mode"] = {"dryrun": "offline", "run": "online"}.get(order["mode"], order["mode"])
    own = order["offline"] if order["mode"] == "offline" else {}
    run = wandb.init(mode=order["mode"], config=order["config"], **own)
    for metrics, axis in order["axes"].items():
        # own x axes: W&B drops what is logged with a step below the last one
        run.define_metric(axis)
        run.define_metric(metrics, step_metric=axis)
    return run


def _has_key() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.login(prompt=False, verify=False))


def _histogram(counts: list[int], edges: list[float]) -> Any:
    import wandb

    return wandb.Histogram(np_histogram=(counts, edges))


def _take_pipes() -> tuple[IO[str], IO[str]]:
    """The pipes to the job, out of reach of W&B and of its service; signals are the job's to take.

    A scheduler may send them to every process of the job.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    orders, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    return orders, replies


def _reply(replies: IO[str], **content: Any) -> None:
    try:
        replies.write(json.dumps(content) + "\n")
    except (OSError, ValueError):  # the job has ended
        return


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


if __name__ == "__main__":
    main()
