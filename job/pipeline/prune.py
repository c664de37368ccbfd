"""The main job: train the base; then, for each round, slim, fine-tune and keep the best."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from job.artifacts.stored_output import stored_output
from job.console import run_progress
from job.distributed.signals import deferred
from job.pipeline.dry_run import dry_run
from job.pipeline.image_cache import fill_cache
from job.pipeline.live import live_facts
from job.pipeline.round import base_round, distil_from, slimming_round, wants_round
from job.pipeline.session import open_session
from job.pipeline.setup import configure, start_up
from job.tracking.kubeflow import trainjob_progress

if TYPE_CHECKING:
    from job.config import PruneConfig


def prune(config: PruneConfig) -> None:
    """Run the main job, or with ``--dry-run`` check what it needs. Raises GammaslimError."""
    with stored_output(config) as local:
        _prune(local)


def _prune(config: PruneConfig) -> None:
    setup = configure(config)
    with deferred():  # from here on, a request to stop waits until the position can be saved
        if config.dry_run:
            dry_run(setup)
            return
        setup = start_up(setup)
        with open_session(setup) as session, trainjob_progress(session.run.path):
            if not session.claim.finished:
                fill_cache(setup, session.run.path)
            with run_progress(session.time_left, partial(live_facts, session)):
                base = model = base_round(session)
                distillation = distil_from(setup, setup.teacher or base.network)
                while wants_round(session, model):
                    model = slimming_round(session, model, distillation)
            session.finish()
