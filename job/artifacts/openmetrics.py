"""``RUN/metrics.prom``: the state of a run for Prometheus, in the text format of OpenMetrics.

node_exporter's textfile collector reads it from a folder. Every value is a gauge, which both
formats know, and the file ends with ``# EOF``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from job.training.epoch import ACCURACY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from job.artifacts.records import EpochRecord, RoundRecord, StatusRecord

PROM_FILE = "metrics.prom"
RUN_STATES = ("running", "stopped", "finished", "failed")
OF_STATUS = {
    "round": "Round in progress, 0 is the base.",
    "epoch": "Epoch of the round in progress, counted from 0.",
    "step": "Optimizer steps since the run began.",
}
OF_EPOCH = {
    "train_loss": "Training loss of the last epoch.",
    "train_acc": "Training accuracy of the last epoch, 0 to 1.",
    "valid_loss": "Validation loss of the last epoch.",
    "valid_acc": "Validation accuracy of the last epoch, 0 to 1.",
    "lr": "Learning rate at the end of the last epoch.",
    "images_per_second": "Images per second of the last epoch, in training.",
}
OF_ROUND = {
    "params": "Parameters of the last saved model.",
    "macs": "Multiply-adds for one image of the last saved model.",
    "width": "Width of the last saved model, as a fraction of the base.",
}


def openmetrics_text(
    run: str, status: StatusRecord, epoch: EpochRecord | None, entry: RoundRecord | None
) -> str:
    """Return the content of metrics.prom; each sample has the label ``run``.

    ``epoch`` is the last one of this attempt and ``entry`` the last saved model, if there are any.
    """
    label = _label("run", run)
    lines = [*_family("state", "Whether the run is in this state.")]
    for state in RUN_STATES:
        value = int(state == status.state)
        lines.append(f"gammaslim_state{{{label},{_label('state', state)}}} {value}")
    for record, names in ((status, OF_STATUS), (epoch, OF_EPOCH), (entry, OF_ROUND)):
        for name, words in names.items() if record else ():
            value = getattr(record, name)
            if value is None or not math.isfinite(value):
                continue
            metric = getattr(record, "metric", ACCURACY)
            if metric != ACCURACY:
                name, words = name.replace(ACCURACY, metric), words.replace("accuracy", metric)
            lines += [*_family(name, words), f"gammaslim_{name}{{{label}}} {value!r}"]
    if status.exit_code is not None:
        words = "Exit code of the job that ended last."
        lines += [
            *_family("exit_code", words),
            f"gammaslim_exit_code{{{label}}} {status.exit_code}",
        ]
    words = "When this file was written, in Unix seconds."
    name = "updated_timestamp_seconds"
    lines += [*_family(name, words), f"gammaslim_{name}{{{label}}} {status.time!r}", "# EOF"]
    return "\n".join(lines) + "\n"


def _family(name: str, words: str) -> Iterator[str]:
    yield f"# HELP gammaslim_{name} {words}"
    yield f"# TYPE gammaslim_{name} gauge"


def _label(name: str, value: str) -> str:
    text = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{text}"'
