"""``prepare``: build the cache of decoded images ahead of the job."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from job.config import PruneConfig
from job.console import say
from job.data.cache.image_set import ImageSet
from job.data.cache.leader import CacheOptions
from job.data.cache.place import scratch_folder
from job.data.cache.sharing import share_cache
from job.distributed.collectives import on_main, start
from job.distributed.signals import deferred
from job.distributed.stop import Watch
from job.errors import UsageError, shown
from job.pipeline.training_data import SPLITS, prepare_data

if TYPE_CHECKING:
    from job.cli.command_options import PrepareOptions


def prepare(data: str | None, options: PrepareOptions) -> None:
    """Check the images as ``prune`` does, and decode them into a file on this node; collective.

    Raises UsageError without a folder for the cache, or if the data are not files.
    """
    folder = Path(options.cache_dir) if options.cache_dir else scratch_folder()
    if folder is None:
        raise UsageError(
            "SLURM_TMPDIR and TMPDIR name no folder for the cache: add --cache-dir PATH, here and "
            "to prune"
        )
    config = PruneConfig(
        data=data,
        on_bad_image=options.on_bad_image,
        cache="disk",
        cache_dir=str(folder),
        cache_max_side=options.cache_max_side,
    )
    start("cpu", "fp32")
    watch = Watch(folder / "STOP", config.checkpoint_every)
    with deferred():
        found, preprocessing = prepare_data(config, watch.check_here)
        images = ImageSet.of(found, SPLITS, preprocessing.max_side)
        if images is None:
            raise UsageError(
                f"{shown(found.root)} is not a folder of image files: nothing to decode"
            )
        cache = CacheOptions("disk", str(folder), folder)
        share_cache(on_main(images.with_key, interrupt=True), cache, watch)
    own = ["--cache-dir", str(folder)] if options.cache_dir else []
    say(f"next: {shown(shlex.join(['gammaslim', 'prune', '--data', data or '', *own]))}")
