"""Progress of a run on its Kubeflow TrainJob (`Kubeflow Trainer`_, KEP-2779).

The controller sets ``KUBEFLOW_TRAINER_SERVER_URL``, and the files of a token and of a certificate
authority, where its feature gate ``TrainJobStatus`` is on. The main process posts the share
that is done, the seconds left and the last metrics there, read from the files of the run.

.. _Kubeflow Trainer: https://www.kubeflow.org/docs/components/trainer
"""

from __future__ import annotations

import json
import math
import os
import ssl
import threading
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from job.artifacts.run_reader import read_run
from job.artifacts.run_status import epochs_of_round, planned_rounds_of, seconds_left
from job.console import warn
from job.errors import GammaslimError, printable, reason
from job.processes import is_main
from job.training.epoch import ACCURACY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.artifacts.history import History
    from job.files import JsonObject

URL, CA, TOKEN = (
    f"KUBEFLOW_TRAINER_SERVER_{name}" for name in ("URL", "CA_CERT", "TOKEN")
)  # environment variables
POST_INTERVAL = 10.0  # seconds between posts; the server asks for 5 at least
POST_TIMEOUT = 5.0  # seconds for one post; the end of the job waits for at most two posts
MAX_SECONDS = 2**31 - 1  # what the field holds


@contextmanager
def trainjob_progress(run: Path) -> Iterator[None]:
    """Post the progress of ``run`` during the block and at its end, if a TrainJob runs this job.

    The first failure is logged as a warning. A failure never ends the job; it delays the end of the
    job by at most twice POST_TIMEOUT.
    """
    if not os.environ.get(URL) or not is_main():
        yield
        return
    reporter = _Reporter(run)
    thread = threading.Thread(target=reporter.work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        reporter.ended.set()
        thread.join(2 * POST_TIMEOUT)


def trainer_status(history: History, now: datetime) -> JsonObject:
    """Return the status of a run as the server takes it.

    ``progressPercentage`` counts epochs. It is 100 only once the run has finished, and left out
    where the number of rounds follows from the accuracies.
    """
    status: JsonObject = {"metrics": _metrics(history), "lastUpdatedTime": now.isoformat()}
    if history.state == "finished":
        return status | {"progressPercentage": 100, "estimatedRemainingSeconds": 0}
    rounds, base, each = (
        planned_rounds_of(history), epochs_of_round(history, 0), epochs_of_round(history, 1),
    )  # fmt: skip
    if rounds is not None and base is not None and each is not None:
        planned = max(1, base + rounds * each)
        status["progressPercentage"] = min(99, 100 * len(history.epochs) // planned)
    if (left := seconds_left(history)) is not None:
        status["estimatedRemainingSeconds"] = min(MAX_SECONDS, math.ceil(left))
    return status


def _metrics(history: History) -> list[JsonObject]:
    """Return the numbers of the last epoch and of the best model; values are texts."""
    values: dict[str, float | None] = {}
    if history.epochs:
        last = history.epochs[-1]
        names = ("round", "epoch", "train_loss", "train_acc", "valid_loss", "valid_acc", "params")
        values |= {name.replace(ACCURACY, last.metric): getattr(last, name) for name in names}
    if history.best:
        values[f"recommended_valid_{history.metric}"] = history.best.valid_acc
        values["recommended_params"] = history.best.params
    return [
        {"name": name, "value": f"{value:.6g}" if isinstance(value, float) else str(value)}
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]


class _Reporter:
    def __init__(self, run: Path) -> None:
        self.run, self.ended = run, threading.Event()
        self._warned = False

    def work(self) -> None:
        while not self.ended.wait(POST_INTERVAL):
            self._report()
        self._report()

    def _report(self) -> None:
        try:
            status = trainer_status(read_run(self.run), datetime.now(UTC))
            _post({"trainerStatus": status})
        except (GammaslimError, OSError, ValueError) as error:  # URLError and SSLError are OSErrors
            if not self._warned:
                warn(
                    "the progress is not shown on the TrainJob, the job continues: "
                    f"{printable(reason(error))}"
                )
            self._warned = True


def _post(payload: JsonObject) -> None:
    """Send ``payload``; the token is read again each time, because it is renewed."""
    token = Path(os.environ.get(TOKEN, "")).read_text("utf-8").strip()
    request = urllib.request.Request(
        os.environ[URL],
        data=json.dumps(payload).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        method="POST",
    )
    if request.type not in ("https", "http"):
        raise ValueError(f"{URL} is not a URL of https")
    trusted = ssl.create_default_context(cafile=os.environ.get(CA) or None)
    with urllib.request.urlopen(request, timeout=POST_TIMEOUT, context=trusted) as answer:
        answer.read()
