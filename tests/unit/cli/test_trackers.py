"""--tracker: one or several, separated by commas or repeated."""

from __future__ import annotations

import click
import pytest

from job.cli.main import gammaslim
from job.config import PruneConfig
from job.errors import UsageError


def trackers(*args: str) -> tuple[str, ...]:
    context = gammaslim.commands["prune"].make_context("prune", list(args))
    found: tuple[str, ...] = context.params["tracker"]
    return found


def test_trackers_are_listed_or_repeated() -> None:
    assert trackers() == ("wandb",)
    assert trackers("--tracker", "tensorboard, mlflow") == ("tensorboard", "mlflow")
    repeated = "--tracker", "wandb,mlflow", "--tracker", "tensorboard", "--tracker", "mlflow"
    assert trackers(*repeated) == ("wandb", "mlflow", "tensorboard")
    with pytest.raises(click.BadParameter):
        trackers("--tracker", "wandb,tensorbord")


def test_wandb_runs_only_where_it_is_a_tracker() -> None:
    assert PruneConfig().wandb_mode == "auto"
    assert PruneConfig(tracker=("mlflow", "wandb"), wandb="offline").wandb_mode == "offline"
    assert PruneConfig(tracker=("tensorboard",)).wandb_mode == "off"
    with pytest.raises(UsageError, match="--wandb online has no effect with --tracker none"):
        PruneConfig(tracker=("none",), wandb="online")
    with pytest.raises(UsageError, match="none excludes the others"):
        PruneConfig(tracker=("none", "mlflow"))
