"""The W&B process: isolates the job from W&B's waits, output and hooks.

`job.tracking.tracker` starts it as a file; it imports nothing from the package. It reads JSON
lines: the settings, then ``log``, ``round`` and ``finish`` events. It writes JSON lines: a
``folder`` or ``failed``, then warnings. W&B itself is configured by its environment variables.
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

FINAL_SYNC = 45.0  # seconds after the last event; then the process exits, whatever W&B does
UPLOAD_WAIT = 3.0  # seconds of FINAL_SYNC to wait for artifact uploads


def main() -> None:
    """Start a W&B run, log the job's events to it, and end it when the job ends."""
    events, replies = _take_pipes()
    settings = json.loads(events.readline())
    sys.argv = settings["argv"]  # W&B shows it as the run's command
    try:
        run = _start_run(settings)
    except Exception as error:  # wandb raises its own, requests' and protobuf's errors
        _reply(replies, failed=_reason(error), mode=settings["mode"])
        os._exit(1)
    folder = os.path.dirname(run.dir)  # noqa: PTH120  (keeps "." in the path)
    _reply(replies, folder=folder, mode=settings["mode"], url=run.url or "")
    run_logger = RunLogger(run, replies)
    for line in events:
        event = json.loads(line)
        if event.pop("event") == "finish":
            run_logger.finish(**event)
            break
        run_logger.log(**event)
    else:  # the job was killed
        run_logger.finish({}, exit_code=1, preempted=False)


class RunLogger:
    """Logs events to the W&B run. Reports the first failure and continues after every one."""

    def __init__(self, run: Any, replies: IO[str]) -> None:
        self.run, self.replies = run, replies
        self.warned = False
        # W&B waits for its server at each artifact or table; scalar values must not wait with it
        self.uploads = ThreadPoolExecutor(1)

    def log(self, values: dict[str, Any], **media: Any) -> None:
        """Log ``values``, and for a round its histograms (counts, edges), table and model."""
        histograms = media.get("histograms", {})
        self._try(lambda: self.run.log(values | {k: _histogram(*h) for k, h in histograms.items()}))
        for name, table in media.get("tables", {}).items():
            self.uploads.submit(self._try, partial(self._log_table, name, *table))
        if model := media.get("model"):
            self.uploads.submit(self._try, partial(self._upload, **model))

    def finish(self, summary: dict[str, Any], exit_code: int, preempted: bool) -> None:
        """End the W&B run; with ``preempted`` W&B expects that the job runs again."""
        deadline = threading.Timer(FINAL_SYNC, os._exit, (1,))
        deadline.daemon = True
        deadline.start()
        with suppress(TimeoutError):
            timeout = FINAL_SYNC if self.run.offline else UPLOAD_WAIT
            self.uploads.submit(lambda: None).result(timeout)
        self._try(lambda: self.run.summary.update(summary))
        if preempted:
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
            if not self.warned:
                _reply(self.replies, warning=_reason(error))
            self.warned = True


def _start_run(settings: dict[str, Any]) -> Any:
    """Start the W&B run; replace the mode ``auto`` in ``settings`` by the mode it selects."""
    import wandb

    if settings["mode"] == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        settings["mode"] = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    offline = settings["offline"] if settings["mode"] == "offline" else {}
    run = wandb.init(mode=settings["mode"], config=settings["config"], **offline)
    for metrics, axis in settings["axes"].items():
        # separate x axes: W&B drops values whose step is below the last one
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
    """Return the pipes to the job, and hide them from W&B and its service.

    Also ignores signals: a scheduler may send them to every process, and only the job handles them.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    events, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    return events, replies


def _reply(replies: IO[str], **content: Any) -> None:
    try:
        replies.write(json.dumps(content) + "\n")
    except (OSError, ValueError):  # the job has ended
        return


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


if __name__ == "__main__":
    main()
