"""Weights & Biases: the run's numbers on a dashboard, online or offline. Never disturbs the job.

All of W&B lives in a process of its own (job.tracking.process). Here a thread passes events on to
it, so that no server, however slow or broken, is ever waited for but a bounded time at the
very end.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from job.config import PruneConfig
from job.console import say, warn
from job.errors import GammaslimError, StopRequest, printable, reason
from job.tracking.segments import Segments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from job.slimming.planning.cost import LayerCost

INIT_TIMEOUT = 30  # seconds, beside the training
SHARE = 0.03  # of the time that a job took, for W&B's last words
SHORTEST, LONGEST = 2.0, 30.0  # seconds, bounds of that
PATIENCE = 8.0  # seconds for W&B's last words when the job was asked to stop
OFFLINE = 20.0  # seconds for writing an offline run to the end
LINGER = 30  # seconds that W&B may go on sending after a finished job
AXES = {"epoch/*": "epoch/step", "round/*": "round/round"}


class Tracker:
    """A W&B run of the main process; ``off`` makes every call do nothing. No call raises."""

    def __init__(self, mode: str, project: str, run: Path, config: Mapping[str, Any]) -> None:
        self.project, self.run, self.config = project, run, dict(config)
        self.began = time.monotonic()
        self.mode = mode  # as the process was started, then as W&B began
        self._events: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._process: subprocess.Popen[str] | None = None
        self._begun = False
        self._thread: threading.Thread | None = None
        if mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            say("W&B: off, by WANDB_MODE")
        elif mode != "off":
            self._begin_beside_the_job()

    def _begin_beside_the_job(self) -> None:
        try:
            self.segments = Segments(self.run)
        except GammaslimError as error:  # the disk is full: the job will say so
            _warn(f"W&B is off: {error}")
        else:
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Numbers of an ``epoch`` or a ``round``, each under its own x axis."""
        self._put("log", values={f"{kind}/{key}": value for key, value in values.items()})

    def log_round(
        self,
        entry: Mapping[str, Any],
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        layers: Sequence[LayerCost],
        model: Path,
    ) -> None:
        """A round's numbers, γ histograms before and after it, its layers, and its model."""
        if not self._thread:
            return
        columns = ["layer", "kind", "in", "out", "params", "macs"]
        rows = [
            [la.name, la.kind, la.channels_in, la.channels_out, la.params, la.macs] for la in layers
        ]
        histograms = {f"round/gamma_before/{name}": _histogram(g) for name, g in before.items()}
        histograms |= {f"round/gamma_after/{name}": _histogram(g) for name, g in after.items()}
        artifact = {
            "name": re.sub(r"[^\w.-]", "_", f"model-{self.segments.id}"),
            "folder": str(model),
            "alias": f"round-{entry['round']}",
            "metadata": dict(entry),
        }
        self._put(
            "round",
            values={f"round/{k}": value for k, value in entry.items() if k != "cautions"},
            histograms=histograms,
            tables={"layers": (columns, rows)},
            model=artifact,
        )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the summary and end the W&B run; what does not arrive soon arrives later or never.

        Waits ``SHARE`` of the job's time so far for a server. Says how to sync what is not sent.
        """
        took = time.monotonic() - self.began
        self._end(summary, 0, min(max(SHORTEST, SHARE * took), LONGEST), LINGER)

    def abandon(self, exit_code: int) -> None:
        """End the W&B run of a job that ends early, in some seconds.

        A job that is to be run again says so: W&B shows it as preempted, not as crashed.
        """
        self._end({}, exit_code, PATIENCE, 0)

    def _put(self, event: str, **content: Any) -> None:
        if self._thread:
            self._events.put({"event": event, **content})

    def _end(self, summary: Mapping[str, Any], exit_code: int, limit: float, linger: int) -> None:
        thread, self._thread = self._thread, None
        if not thread:
            return
        again = exit_code == StopRequest.exit_code
        finish = {"summary": dict(summary), "exit_code": exit_code, "again": again}
        self._events.put({"event": "finish", **finish})
        thread.join(OFFLINE if self.mode == "offline" else limit)
        if thread.is_alive() and not self._begun:  # nothing is written yet, it must not stay so
            process = self._process
            if process and self.mode != "offline":
                process.kill()  # the offline one follows
            thread.join(OFFLINE)
        if thread.is_alive() and linger:
            say(f"W&B: not all is sent yet; sending continues for up to {linger} s after the job")
        elif thread.is_alive() and self._process:
            self._process.kill()
        if command := self.segments.sync_command():
            say(f"W&B: to be sent later: {printable(command)}")

    def _serve(self) -> None:
        """Begin a W&B run, online or else offline, and pass events on; in a thread."""
        try:
            begun = self._begin(self.mode, instead=False)
            if not begun and self.mode != "offline":
                begun = self._begin("offline", instead=True)
            if begun:
                self._pass_on()
        except Exception as error:  # nothing about W&B may disturb the job, nor print a traceback
            _warn(f"W&B failed and is off from here on: {reason(error)}")

    def _begin(self, mode: str, *, instead: bool) -> bool:
        """Start the process and hear whether W&B has begun."""
        self.mode = mode
        self._process = process = _start(self._variables(mode))
        assert process.stdin
        order = {
            "mode": mode,
            "config": self.config,
            "axes": AXES,
            "offline": self.segments.offline(self.run.name, instead=instead),
            "argv": sys.argv,
        }
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        answer = self._answer() or {"failed": "the job ended before"}
        self.mode = answer.get("mode", mode)
        if "failed" in answer:
            then = "it is off" if self.mode == "offline" else "continuing offline"
            _warn(f"W&B did not begin ({answer['failed']}): {then}")
            return False
        self.segments.begun(answer["begun"])
        self._begun = True
        later = f"offline; later: {printable(self.segments.sync_command() or '')}"
        say(f"W&B: {answer['url'] if self.mode == 'online' else later}")
        return True

    def _pass_on(self) -> None:
        assert self._process
        assert self._process.stdin
        last = False
        with suppress(BrokenPipeError):  # it has ended, and says below why
            while not last:
                event = self._events.get()
                last = event["event"] == "finish"
                self._process.stdin.write(json.dumps(event) + "\n")
                self._process.stdin.flush()
        problem = None if last else "its process has ended"
        while answer := self._answer():
            problem = answer.get("warning", problem)
        ended = self._process.wait()
        if problem:
            _warn(f"W&B did not take everything: {problem}")
        elif self.mode == "online" and ended == 0:
            self.segments.sent()

    def _answer(self) -> dict[str, Any]:
        """The process's next answer; empty when it has ended."""
        assert self._process
        assert self._process.stdout
        line = self._process.stdout.readline()
        return dict(json.loads(line)) if line else {}

    def _variables(self, mode: str) -> dict[str, str]:
        """The environment of W&B's process: the user's variables win, but an empty one is none."""
        own = {
            "WANDB_PROJECT": self.project,
            "WANDB_NAME": self.run.name,
            "WANDB_DIR": str(self.run),
            "WANDB_RESUME": "allow",
            "WANDB_DATA_DIR": str(self.run / "wandb"),  # staged artifacts
            "WANDB_INIT_TIMEOUT": str(INIT_TIMEOUT),
            "WANDB_FINISH_TIMEOUT": str(LINGER),
            "WANDB_FINISH_TIMEOUT_RAISES": "true",
            "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # seconds; a killed one can be synced too
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_DISABLE_GIT": "true",
            "WANDB__DISABLE_STATS": "true",
        }
        users = {k: v for k, v in os.environ.items() if v or not k.startswith("WANDB_")}
        if self.project != PruneConfig.wandb_project:  # it was asked for
            users.pop("WANDB_PROJECT", None)
        if mode != "auto":
            users["WANDB_MODE"] = mode
        return {**own, **users, "WANDB_RUN_ID": self.segments.id}


def gammas(network: nn.Module) -> dict[str, Any]:
    """γ of every BatchNorm2d that has one, by layer name: arrays (C,)."""
    from torch import nn

    return {
        name.replace(".", "_"): layer.weight.detach().float().cpu().numpy()
        for name, layer in network.named_modules()
        if isinstance(layer, nn.BatchNorm2d) and layer.affine
    }


def _histogram(values: Any) -> tuple[list[int], list[float]]:
    """Counts in 64 equal bins, and the bins' edges."""
    counts, edges = np.histogram(values[np.isfinite(values)], bins=64)
    return counts.tolist(), edges.tolist()


def _start(variables: Mapping[str, str]) -> subprocess.Popen[str]:
    program = Path(__file__).with_name("process.py")
    return subprocess.Popen(
        [sys.executable, "-P", str(program)],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # signals to the job's process group are not for it
    )


def _warn(text: str) -> None:
    key = os.environ.get("WANDB_API_KEY")
    text = text.replace(key, "…") if key else text
    warn(text)
