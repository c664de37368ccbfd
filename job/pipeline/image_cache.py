"""Fill the cache of decoded images before the first epoch of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from job.console import amount, say
from job.data.cache.leader import CacheOptions
from job.data.cache.place import choose_place, uncached_message
from job.data.cache.sharing import share_cache
from job.distributed.collectives import on_main
from job.errors import shown

if TYPE_CHECKING:
    from pathlib import Path

    from job.pipeline.setup import Setup


def fill_cache(setup: Setup, run: Path) -> None:
    """Find or build the cache of the run in ``run``; collective.

    Raises StopRequest, and GammaslimError if a cache that --cache asks for cannot be made.
    """
    images, options = setup.cache.images, _options(setup, run)
    if images is None or options.mode == "off":
        return
    images = on_main(images.with_key, interrupt=True)
    setup.cache.stored = share_cache(images, options, setup.watch)


def forecast_cache(setup: Setup) -> None:
    """Print where a run would store its decoded images; raises StorageError without space."""
    images, options = setup.cache.images, _options(setup, setup.folder)
    if images is None or options.mode == "off":
        return
    needed = images.layout.length
    if options.find(images.with_key().key):
        say(f"cache: {amount(needed)} of decoded images are found")
        return
    place = choose_place(options.mode, options.cache_dir, options.run, needed)
    if not place.exists:
        say(uncached_message(place.reason))
        return
    where = shown(place.folder) if place.folder else "memory"
    say(f"cache: decoded images take {amount(needed)}; they are stored in {where}")


def _options(setup: Setup, run: Path) -> CacheOptions:
    return CacheOptions(setup.config.cache, setup.config.cache_dir, run)
