"""Log a run to Weights & Biases, online or offline, without ever disturbing the job.

W&B runs in a separate process, `job.tracking.wandb_process`. A thread forwards events to it: the
job never waits for a server, except for a bounded time at its end.
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
from typing import TYPE_CHECKING

from job.config import PruneConfig
from job.console import say, warn
from job.errors import GammaslimError, StopRequest, printable, reason
from job.tracking.wandb_events import AXES
from job.tracking.wandb_runs import Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from job.tracking.wandb_events import WandbEvent, WandbModel
    from job.tracking.wandb_process import (
        FinishEvent,
        LogEvent,
        ModelUpload,
        Reply,
        RunInput,
        Settings,
    )

INIT_TIMEOUT = 30  # seconds; training does not wait for it
SYNC_SHARE = 0.03  # fraction of the job's time that the final sync may take
MIN_SYNC, MAX_SYNC = 2.0, 30.0  # seconds, bounds of the final sync
STOP_SYNC = 8.0  # seconds for the final sync of a job that ends early
OFFLINE_FLUSH = 20.0  # seconds for writing the rest of an offline run
LINGER = 30  # seconds that W&B may continue to send after a finished job


class Tracker:
    """The W&B run of the main process. No method raises; with mode ``off`` none does anything."""

    def __init__(
        self,
        mode: str,
        project: str,
        run: Path,
        config: Mapping[str, object],
        inputs: Sequence[RunInput] = (),
    ) -> None:
        self.project, self.run, self.config, self.inputs = project, run, dict(config), inputs
        self.start_time = time.monotonic()
        self.mode = mode  # the requested mode, then the mode that W&B started in
        self._events: SimpleQueue[LogEvent | FinishEvent] = SimpleQueue()
        self._process: subprocess.Popen[str] | None = None
        self._started = False
        self._thread: threading.Thread | None = None
        if mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
            say("W&B: off, by WANDB_MODE")
        elif mode != "off":
            self._start_thread()

    def _start_thread(self) -> None:
        try:
            self.segments = Segments(self.run)
        except GammaslimError as error:  # the disk is full: the job reports it
            _warn(f"W&B is off: {error}")
        else:
            self._thread = threading.Thread(target=self._forward_events, daemon=True)
            self._thread.start()

    def log(self, build: Callable[[], WandbEvent]) -> None:
        """Log the event that ``build`` returns; its model is uploaded later.

        ``build`` is only called while a W&B run receives events.
        """
        if not self._thread or not self._thread.is_alive():
            return
        try:
            event = build()
        except GammaslimError as error:  # e.g. the storage fails
            _warn(f"W&B did not log everything: {error}")
            return
        self._events.put({
            "event": "log",
            "values": event.values,
            "histograms": event.histograms,
            "tables": event.tables,
            "charts": event.charts,
            "galleries": event.galleries,
            "model": self._upload(event.model) if event.model else None,
        })  # fmt: skip

    def _upload(self, model: WandbModel) -> ModelUpload:
        name = re.sub(r"[^\w.-]", "_", f"model-{self.segments.id}")
        return {
            "name": name, "folder": model.folder, "aliases": model.aliases,
            "metadata": model.metadata,
        }  # fmt: skip

    def finish(self, summary: Mapping[str, object]) -> None:
        """Send the summary and end the W&B run.

        Waits for the server for SYNC_SHARE of the job's time so far. Prints the command that
        syncs what is not sent by then.
        """
        elapsed = time.monotonic() - self.start_time
        self._end(summary, 0, min(max(MIN_SYNC, SYNC_SHARE * elapsed), MAX_SYNC), LINGER)

    def abandon(self, exit_code: int) -> None:
        """End the W&B run of a job that ends early, within a few seconds.

        W&B shows a job that was requested to stop as preempted, not as crashed.
        """
        self._end({}, exit_code, STOP_SYNC, 0)

    def _end(
        self, summary: Mapping[str, object], exit_code: int, limit: float, linger: int
    ) -> None:
        thread, self._thread = self._thread, None
        if not thread:
            return
        preempted = exit_code == StopRequest.exit_code
        self._events.put({
            "event": "finish", "summary": summary, "exit_code": exit_code, "preempted": preempted,
        })  # fmt: skip
        thread.join(OFFLINE_FLUSH if self.mode == "offline" else limit)
        if thread.is_alive() and not self._started:  # no event is on the disk yet
            process = self._process
            if process and self.mode != "offline":
                process.kill()  # then the thread starts an offline run
            thread.join(OFFLINE_FLUSH)
        if thread.is_alive() and linger:
            say(f"W&B: not all data is sent yet; sending continues for up to {linger} s")
        elif thread.is_alive() and self._process:
            self._process.kill()
        if command := self.segments.sync_command():
            say(f"W&B: to send the rest later: {printable(command)}")

    def _forward_events(self) -> None:
        """Start a W&B run, offline where online fails, and forward events to it; in a thread."""
        try:
            started = self._start_run(self.mode, instead=False)
            if not started and self.mode != "offline":
                started = self._start_run("offline", instead=True)
            if started:
                self._send_events()
        except Exception as error:  # no failure of W&B may end the job or print a traceback
            _warn(f"W&B failed and is now off: {reason(error)}")

    def _start_run(self, mode: str, *, instead: bool) -> bool:
        """Start the W&B process; return whether W&B started a run in it."""
        self.mode = mode
        self._process = process = _start_process(self._variables(mode))
        assert process.stdin
        settings: Settings = {
            "mode": mode,
            "config": self.config,
            "axes": AXES,
            "inputs": self.inputs,
            "offline": self.segments.offline(self.run.name, instead=instead),
            "argv": sys.argv,
        }
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
        answer = self._answer()
        if "mode" in answer:  # before W&B writes anything
            self.mode = answer["mode"]
            answer = self._answer()
        answer = answer or {"failed": "its process has ended"}
        if "failed" in answer:
            then = "it is off" if self.mode == "offline" else "continuing offline"
            _warn(f"W&B did not start ({answer['failed']}): {then}")
            return False
        self.segments.add_folder(answer["folder"])
        self._started = True
        later = f"offline; to send it later: {printable(self.segments.sync_command() or '')}"
        say(f"W&B: {answer['url'] if self.mode == 'online' else later}")
        return True

    def _send_events(self) -> None:
        assert self._process
        assert self._process.stdin
        finished = False
        with suppress(BrokenPipeError):  # the process has ended; its replies say why
            while not finished:
                event = self._events.get()
                finished = event["event"] == "finish"
                self._process.stdin.write(json.dumps(event) + "\n")
                self._process.stdin.flush()
        problem = None if finished else "its process has ended"
        while answer := self._answer():
            problem = answer.get("warning", problem)
        exit_status = self._process.wait()
        if problem:
            _warn(f"W&B did not log everything: {problem}")
        elif self.mode == "online" and exit_status == 0:
            self.segments.mark_sent()

    def _answer(self) -> Reply:
        """Return the next answer of the W&B process; empty when the process has ended."""
        assert self._process
        assert self._process.stdout
        line = self._process.stdout.readline()
        reply: Reply = json.loads(line) if line else {}
        return reply

    def _variables(self, mode: str) -> dict[str, str]:
        """Return the environment of the W&B process.

        The user's W&B variables take precedence, except empty ones.
        """
        defaults = {
            "WANDB_PROJECT": self.project,
            "WANDB_NAME": self.run.name,
            "WANDB_DIR": str(self.run),
            "WANDB_RESUME": "allow",
            "WANDB_DATA_DIR": str(self.run / "wandb"),  # staged artifacts
            "WANDB_INIT_TIMEOUT": str(INIT_TIMEOUT),
            "WANDB_FINISH_TIMEOUT": str(LINGER),
            "WANDB_FINISH_TIMEOUT_RAISES": "true",
            "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # seconds; a killed run can be synced too
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_DISABLE_GIT": "true",
            "WANDB__DISABLE_STATS": "true",
        }
        users = {k: v for k, v in os.environ.items() if v or not k.startswith("WANDB_")}
        if self.project != PruneConfig.wandb_project:  # the option was given
            users.pop("WANDB_PROJECT", None)
        if mode != "auto":
            users["WANDB_MODE"] = mode
        return {**defaults, **users, "WANDB_RUN_ID": self.segments.id}


def _start_process(variables: Mapping[str, str]) -> subprocess.Popen[str]:
    program = Path(__file__).with_name("wandb_process.py")
    return subprocess.Popen(
        [sys.executable, "-P", str(program)],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # it must not receive signals to the job's process group
    )


def _warn(text: str) -> None:
    key = os.environ.get("WANDB_API_KEY")
    text = text.replace(key, "…") if key else text
    warn(text)
