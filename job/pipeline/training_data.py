"""Prepare the data set of a run: open it, check its images, hold out a validation split."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from job.artifacts.provenance import stored_listing
from job.artifacts.records import DatasetRecord
from job.artifacts.run_folder import likely_run_folder
from job.artifacts.stored_places import place_of
from job.console import counted, progress, say
from job.data.cache.image_set import ImageSet
from job.data.cache.leader import CacheOptions
from job.data.dataset import Dataset, hold_out_validation, missing_class_notes
from job.data.folders import CURRENT_LISTING
from job.data.image_check import check_images
from job.data.layout import open_data
from job.data.preprocessing_options import PreprocessingOptions
from job.data.split_names import SPLIT_NAMES
from job.data.splits import UNLABELLED
from job.data.task_items import ItemSplit
from job.distributed.collectives import on_main
from job.errors import shown
from job.models.input_size import check_memory
from job.pipeline.base_model import slim_base_preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from job.config import PruneConfig
    from job.data.geometry import Size
    from job.data.preprocessing import Preprocessing

SPLITS = ("training", "validation")  # the testing split never chooses a model


def prepare_data(
    config: PruneConfig, check_stop: Callable[[], None] = lambda: None, output: Path | None = None
) -> tuple[Dataset, Preprocessing]:
    """Return the data set, with its images checked, and the preprocessing; collective.

    ``check_stop`` is called between images and may raise. An existing run in ``output`` is resumed
    with its original files, even if this version recognises more files. Raises
    InputNotFound, DataError or UsageError.
    """

    def prepare() -> tuple[Dataset, Preprocessing]:
        PreprocessingOptions.of(config).check()
        data = open_data(config.data, stored_listing(output) if output else CURRENT_LISTING)
        for split in SPLITS:
            if split in data.splits or split == "training":
                data.labelled(split)
        bar = progress("checking images")

        def checking(results: Iterable[Any], count: int) -> Iterable[Any]:
            for result in bar(results, count):
                check_stop()
                yield result

        present = [split for split in SPLITS if split in data.splits]
        known = known_sizes(config, data, output)
        data, largest = check_images(data, present, config.on_bad_image, checking, known)
        data = hold_out_validation(data, config.seed)
        data = replace(data, notes=(*data.notes, *missing_class_notes(data)))
        base, options = slim_base_preprocessing(config), PreprocessingOptions.of(config)
        limit = config.cache_max_side if largest > (config.cache_max_side or largest) else None
        result = options.override(base) if base else options.resolve(min(largest, limit or largest))
        return data, replace(result, max_side=limit or result.max_side)

    data, preprocessing = on_main(prepare, interrupt=True)
    check_memory(preprocessing.size)
    say(describe_data(data, preprocessing))
    return data, preprocessing


def describe_data(data: Dataset, preprocessing: Preprocessing) -> str:
    """Return the layout, splits and classes, then a line per note and skipped image."""
    present = [name for name in SPLIT_NAMES if name in data.splits]
    counts = ", ".join(f"{len(data.splits[name]):,} {name}" for name in present)
    place = data.root if data.layout == "built-in" else f"{data.layout} in {data.root}"
    lines = [
        f"data: {place}: {counts}, {counted(len(data.class_names), 'class')}; "
        f"{preprocessing.describe()}"
    ]
    lines += [f"data: {note}" for note in data.notes]
    if data.skipped:
        lines.append(f"data: skipped: {counted(len(data.skipped), 'image')} that cannot be read:")
        lines += [f"  {shown(name)}" for name in data.skipped]
    return "\n".join(lines)


def known_sizes(config: PruneConfig, data: Dataset, output: Path | None) -> dict[str, Size]:
    """Return the sizes of the images that an earlier run has decoded into a cache, by path."""
    options = CacheOptions(config.cache, config.cache_dir, output or likely_run_folder(config))
    for max_side in dict.fromkeys((None, config.cache_max_side)):
        images = ImageSet.of(data, SPLITS, max_side)
        try:
            stored = options.find(images.with_key().key) if images else None
        except OSError:  # a file is missing: the check reports it
            return {}
        if images and stored:
            return stored.original_sizes(images.split.paths)
    return {}


def _testable(data: Dataset) -> int:
    """Return the number of test images or items; 0 without their labels."""
    split = data.splits.get("testing") or data.splits.get("evaluation")
    if split is None:
        return 0
    unlabelled = not isinstance(split, ItemSplit) and (split.labels == UNLABELLED).any()
    return 0 if unlabelled else len(split)


def dataset_record(data: Dataset, max_side: int | None = None) -> DatasetRecord:
    """Return the record of the data set for config.toml; ``max_side`` limits its images."""
    path = shown(place_of(os.path.abspath(data.source)))  # noqa: PTH100 (links stay links)
    return DatasetRecord(
        layout=data.layout,
        root=str(data.root),
        listing=data.listing,
        path=path if data.source and data.layout != "built-in" else None,
        training=len(data.splits["training"]),
        validation=len(data.splits["validation"]),
        testing=_testable(data),
        skipped=tuple(shown(name) for name in data.skipped),
        max_side=max_side,
        fingerprint=data.fingerprint(SPLITS),
    )
