"""The W&B process: isolates the job from W&B's waits, output and hooks.

`job.tracking.wandb_tracker` starts it as a file; it imports nothing from the package. It reads JSON
lines: `Settings`, then `LogEvent` and at last `FinishEvent`. It writes JSON lines, `Reply`: the
``mode``, a ``folder`` or ``failed``, then warnings. W&B itself is configured by its environment
variables.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Histogram = tuple[list[int], list[float]]  # counts, edges of the bins
    Table = tuple[Sequence[str], Sequence[Sequence[object]]]  # columns, rows

FINAL_SYNC = 45.0  # seconds after the last event; then the process exits, whatever W&B does
UPLOAD_WAIT = 3.0  # seconds of FINAL_SYNC to wait for artifact uploads


class OfflineNames(TypedDict, total=False):
    """Arguments of ``wandb.init`` for an offline run."""

    id: str
    name: str
    group: str


class Settings(TypedDict):
    """How a W&B run starts: ``axes`` maps keys to the key of their x axis."""

    mode: str
    config: dict[str, object]
    axes: Mapping[str, str]
    inputs: Sequence[RunInput]
    offline: OfflineNames
    argv: list[str]


class RunInput(TypedDict):
    """What a run starts from: an artifact of the W&B type ``kind`` that holds its metadata."""

    name: str
    kind: str
    metadata: Mapping[str, object]


class ModelUpload(TypedDict):
    """A model to upload as the artifact ``name``: the files of ``folder``."""

    name: str
    folder: str
    aliases: Sequence[str]
    metadata: Mapping[str, object]


class WandbChart(TypedDict):
    """A chart over a table: ``fields`` maps the fields of W&B's preset ``spec`` to columns."""

    spec: str
    title: str
    fields: Mapping[str, str]
    table: Table


class LogEvent(TypedDict):
    """Values that W&B logs together, and what belongs to a round: see `WandbEvent`.

    The first column of the tables in ``galleries`` holds images, as data URLs.
    """

    event: Literal["log"]
    values: Mapping[str, object]
    histograms: Mapping[str, Histogram]
    tables: Mapping[str, Table]
    charts: Mapping[str, WandbChart]
    galleries: Mapping[str, Table]
    model: ModelUpload | None


class FinishEvent(TypedDict):
    """End of the job; with ``preempted`` W&B expects that it runs again."""

    event: Literal["finish"]
    summary: Mapping[str, object]
    exit_code: int
    preempted: bool


class Reply(TypedDict, total=False):
    """The mode of the W&B run, or its folder and URL, or why there is none, or a warning."""

    mode: str
    folder: str
    url: str
    failed: str
    warning: str


def main() -> None:
    """Start a W&B run, log the job's events to it, and end it when the job ends."""
    events, replies = _take_pipes()
    settings: Settings = json.loads(events.readline())
    sys.argv = settings["argv"]  # W&B shows it as the run's command
    try:
        mode = _mode(settings["mode"])
        _reply(replies, {"mode": mode})
        run = _start_run(mode, settings)
    except Exception as error:  # wandb raises its own, requests' and protobuf's errors
        _reply(replies, {"failed": _reason(error)})
        os._exit(1)
    folder = os.path.dirname(run.dir)  # noqa: PTH120  (keeps "." in the path)
    _reply(replies, {"folder": folder, "url": run.url or ""})
    run_logger = RunLogger(run, replies)
    run_logger.use(settings["inputs"])
    for line in events:
        event: LogEvent | FinishEvent = json.loads(line)
        if event["event"] == "finish":
            run_logger.finish(event)
            break
        run_logger.log(event)
    else:  # the job was killed
        run_logger.finish({"event": "finish", "summary": {}, "exit_code": 1, "preempted": False})


class RunLogger:
    """Logs events to the W&B run. Reports the first failure and continues after every one."""

    def __init__(self, run: Any, replies: IO[str]) -> None:
        self.run, self.replies = run, replies
        self.warned = False
        # W&B waits for its server at each artifact or table; scalar values must not wait with it
        self.uploads = ThreadPoolExecutor(1)

    def use(self, inputs: Sequence[RunInput]) -> None:
        """Declare what the run starts from."""
        for item in inputs:
            self.uploads.submit(self._try, partial(self._use, item))

    def log(self, event: LogEvent) -> None:
        """Log the values and histograms of ``event``; the rest follows in a thread."""
        histograms = event["histograms"].items()
        if event["values"] or histograms:
            self._try(
                lambda: self.run.log(
                    {**event["values"], **{k: _histogram(*h) for k, h in histograms}}
                )
            )
        drawn = (
            [partial(self._log_drawn, k, _table, t) for k, t in event["tables"].items()]
            + [partial(self._log_drawn, k, _chart, c) for k, c in event["charts"].items()]
            + [partial(self._log_drawn, k, _gallery, t) for k, t in event["galleries"].items()]
        )
        for call in drawn:
            self.uploads.submit(self._try, call)
        if model := event["model"]:
            self.uploads.submit(self._try, partial(self._upload, model))

    def finish(self, event: FinishEvent) -> None:
        """End the W&B run."""
        deadline = threading.Timer(FINAL_SYNC, os._exit, (1,))
        deadline.daemon = True
        deadline.start()
        with suppress(TimeoutError):
            timeout = FINAL_SYNC if self.run.offline else UPLOAD_WAIT
            self.uploads.submit(lambda: None).result(timeout)
        self._try(lambda: self.run.summary.update(event["summary"]))
        if event["preempted"]:
            self._try(self.run.mark_preempting)
        self._try(lambda: self.run.finish(exit_code=event["exit_code"]))

    def _log_drawn(self, name: str, draw: Callable[[Any], object], content: object) -> None:
        self.run.log({name: draw(content)})

    def _upload(self, model: ModelUpload) -> None:
        import wandb

        artifact = wandb.Artifact(model["name"], "model", metadata=dict(model["metadata"]))
        for file in sorted(Path(model["folder"]).iterdir()):
            artifact.add_file(str(file))
        self.run.log_artifact(artifact, aliases=list(model["aliases"]))

    def _use(self, item: RunInput) -> None:
        import wandb

        artifact = wandb.Artifact(item["name"], item["kind"], metadata=dict(item["metadata"]))
        with artifact.new_file(f"{item['kind']}.json") as file:
            json.dump(item["metadata"], file, indent=2)
        # use_artifact refuses offline runs and waits for the server; what it calls does neither
        self.run._log_artifact(artifact, use_after_commit=True)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # see main
            if not self.warned:
                _reply(self.replies, {"warning": _reason(error)})
            self.warned = True


def _mode(mode: str) -> str:
    """Return ``mode``, or what ``auto`` stands for."""
    if mode != "auto":
        return mode
    asked = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    return {"dryrun": "offline", "run": "online"}.get(asked, asked)


def _start_run(mode: Any, settings: Settings) -> Any:  # W&B refuses unknown modes
    import wandb

    names: OfflineNames = settings["offline"] if mode == "offline" else {}
    run = wandb.init(mode=mode, config=settings["config"], **names)
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


def _table(table: Table) -> Any:
    import wandb

    columns, rows = table
    return wandb.Table(columns=list(columns), data=list(rows))


def _chart(chart: WandbChart) -> Any:
    import wandb

    return wandb.plot_table(
        chart["spec"], _table(chart["table"]), dict(chart["fields"]), {"title": chart["title"]}
    )


def _gallery(table: Table) -> Any:
    import wandb
    from PIL import Image

    def image(url: object) -> Any:
        content = base64.b64decode(str(url).partition(",")[2])
        return wandb.Image(Image.open(io.BytesIO(content)))

    columns, rows = table
    return _table((columns, [[image(url), *rest] for url, *rest in rows]))


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


def _reply(replies: IO[str], reply: Reply) -> None:
    try:
        replies.write(json.dumps(reply) + "\n")
    except (OSError, ValueError):  # the job has ended
        return


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


if __name__ == "__main__":
    main()
