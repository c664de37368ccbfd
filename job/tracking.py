"""Weights & Biases: the run's numbers on a dashboard, online or offline. Never ends the job."""

from __future__ import annotations

import os
import re
import shlex
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from job.errors import StopRequest, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from job.slimming.cost import LayerCost

INIT_TIMEOUT = 30  # seconds
PATIENCE = 8.0  # seconds for W&B's last words when the job was asked to stop


class Tracker:
    """A W&B run of the main process; ``off`` makes every call do nothing."""

    def __init__(self, mode: str, project: str, run: Path, config: Mapping[str, Any]) -> None:
        self.run: Any = None
        if mode != "off":
            self.run = _start(mode, project, run, config)
            self._try(self._define_axes)  # does nothing when W&B did not begin

    def _define_axes(self) -> None:
        # own x axes: W&B drops what is logged with a step below the last one
        for metrics, axis in AXES.items():
            self.run.define_metric(axis)
            self.run.define_metric(metrics, step_metric=axis)

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Numbers of an ``epoch`` or a ``round``, each under its own x axis."""
        if self.run:
            self._try(lambda: self.run.log({f"{kind}/{key}": v for key, v in values.items()}))

    def log_round(
        self,
        entry: Mapping[str, Any],
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        layers: Sequence[LayerCost],
        model: Path,
    ) -> None:
        """A round's numbers, γ histograms before and after it, its layers, and its model."""
        if not self.run:
            return
        import wandb

        def log() -> None:
            columns = ["layer", "kind", "in", "out", "params", "macs"]
            rows = [
                [la.name, la.kind, la.channels_in, la.channels_out, la.params, la.macs]
                for la in layers
            ]
            values: dict[str, Any] = {"layers": wandb.Table(columns=columns, data=rows)}
            values |= {f"gamma_before/{name}": wandb.Histogram(g) for name, g in before.items()}
            values |= {f"gamma_after/{name}": wandb.Histogram(g) for name, g in after.items()}
            self.log("round", {**entry, **values})
            artifact = wandb.Artifact(
                re.sub(r"[^\w.-]", "_", f"model-{self.run.id}"), "model", metadata=dict(entry)
            )
            for file in sorted(model.iterdir()):
                artifact.add_file(str(file))
            self.run.log_artifact(artifact, aliases=[f"round-{entry['round']}"])

        self._try(log)

    def finish(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        """Send the summary and end the W&B run."""
        if self.run:
            self._try(lambda: self.run.summary.update(dict(summary)))
            self._try(lambda: self.run.finish(exit_code=exit_code))
            self.run = None

    def abandon(self, exit_code: int) -> bool:
        """End the W&B run of a job that ends early; False when that takes more than some seconds.

        A job that is to be run again says so: W&B shows it as preempted, not as crashed.
        """
        if not self.run:
            return True
        if exit_code == StopRequest.exit_code:
            self._try(lambda: self.run.mark_preempting())
        thread = threading.Thread(target=self.finish, args=({}, exit_code), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        return not thread.is_alive()

    def _try(self, call: Callable[[], Any]) -> None:
        """A dashboard must not end the job: the first failure is said, then W&B is left alone."""
        try:
            if self.run:
                call()
        except Exception as error:  # wandb raises its own, requests' and protobuf's errors
            click.echo(f"Warning: W&B failed and is off from here on: {reason(error)}", err=True)
            self.run = None


AXES = {"epoch/*": "epoch/step", "round/*": "round/round"}


def gammas(network: nn.Module) -> dict[str, Any]:
    """γ of every BatchNorm2d, by layer name: arrays (C,)."""
    from torch import nn

    return {
        name.replace(".", "_"): layer.weight.detach().float().cpu().numpy()
        for name, layer in network.named_modules()
        if isinstance(layer, nn.BatchNorm2d)
    }


def _start(mode: str, project: str, run: Path, config: Mapping[str, Any]) -> Any:
    """Begin a W&B run; offline under the run directory when it cannot be online."""
    os.environ.setdefault("WANDB_DATA_DIR", str(run / "wandb"))  # staged artifacts
    import wandb

    wanted = mode
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")

    def init(mode: Any) -> Any:
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT,
            silent=True,
            console="off",
            disable_git=True,
            x_disable_stats=True,
        )
        begun = wandb.init(
            mode=mode,
            project=os.environ.get("WANDB_PROJECT", project),
            name=os.environ.get("WANDB_NAME", run.name),
            dir=str(run),
            config=dict(config),
            settings=settings,
        )
        click.echo(f"W&B: {_place(begun, mode)}")
        return begun

    for attempt in (wanted, "offline"):
        try:
            return init(attempt)
        except Exception as error:  # see _try
            then = "going on without it" if attempt == "offline" else "going on offline"
            click.echo(
                f"Warning: W&B did not begin within {INIT_TIMEOUT} s ({reason(error)}): {then}",
                err=True,
            )
            if attempt == "offline":
                break
    return None


def _place(begun: Any, mode: str) -> str:
    if mode == "disabled":
        return "off"
    if mode == "online":
        return str(begun.url)
    return f"offline; later: wandb sync {shlex.quote(str(Path(begun.dir).parent))}"


def _has_key() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.login(prompt=False, verify=False))
