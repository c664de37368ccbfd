"""Layouts: the ways to store a data set on disk, with functions that recognise and open them.

To add a layout, write a function that opens it, in its own module, and add an entry to ``LAYOUTS``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from job.data.archive import ArchivePath, FilePath, is_archive, open_archive
from job.data.class_folder_layout import open_class_folders, open_unsplit_class_folders
from job.data.csv_layout import open_csv_file, open_csv_folder
from job.data.dataset import Dataset
from job.data.folders import CURRENT_LISTING, Lister, subfolders
from job.data.food11_layout import open_food11_folder
from job.data.idx_layout import open_idx_folder
from job.data.metadata_layout import open_metadata_file, open_metadata_folder
from job.data.shard_layout import expand_pattern, is_shard_pattern, open_shard_folder, open_shards
from job.data.splits import FileSplit
from job.errors import DataError, InputNotFound, shown

if TYPE_CHECKING:
    from collections.abc import Callable

BUILT_IN = "built-in"  # the value of --data, and the layout
IMAGES_ONLY = "images"  # the layout of any folder of images, which is not a data set
UNSPLIT = "class folders without splits"
MAX_DEPTH = 3  # of nested folders, each alone in its parent, that are searched for a data set
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A way to store a data set.

    ``open_folder`` returns the data set in a folder, or None when the folder has another layout;
    ``open_file`` opens a file whose name ends in ``suffix``. Both raise DataError for an
    invalid data set of this layout. ``help`` completes "looked for …".
    """

    help: str
    open_folder: Callable[[FilePath, Lister], Dataset | None]
    open_file: Callable[[Path], Dataset] | None = None
    suffix: str = ""
    has_splits: bool = True
    numbered_files: bool = False  # whether test images may be named by their Kaggle ids


# tried in this order
LAYOUTS = {
    "IDX files": Layout(
        "IDX files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…; gzipped or not)",
        open_idx_folder,
        numbered_files=True,
    ),
    "metadata files": Layout(
        "metadata.csv or metadata.jsonl in a folder or its splits (file_name, label)",
        open_metadata_folder,
        open_metadata_file,
        suffix=".jsonl",
    ),
    "class folders": Layout(
        "class folders (train/CLASS/*.jpg, val/CLASS/…, test/CLASS/…)",
        open_class_folders,
        numbered_files=True,
    ),
    "Food-11 files": Layout(
        "Food-11 files (training/3_45.jpg, validation/…, testing/… or evaluation/…)",
        open_food11_folder,
        numbered_files=True,
    ),
    "CSV": Layout(
        "a CSV file of paths and labels (train.csv: file,label)",
        open_csv_folder,
        open_csv_file,
        suffix=".csv",
    ),
    "WebDataset shards": Layout(
        "WebDataset shards (train-000.tar, val-000.tar, …; or train-{000..147}.tar)",
        open_shard_folder,
    ),
    UNSPLIT: Layout(
        "class folders without splits (CLASS/*.jpg)", open_unsplit_class_folders, has_splits=False
    ),
}


def open_data(path: str | None, listing: int = CURRENT_LISTING) -> Dataset:
    """Open the data set at ``path``, or the built-in one; raises InputNotFound or DataError.

    ``listing`` is the version of the rules for listing folders.
    """
    if path is None or (path == BUILT_IN and not Path(path).exists()):
        return open_builtin()
    return replace(open_path(path, listing), source=path, listing=listing)


def open_builtin() -> Dataset:
    """Open the sample of Fashion-MNIST that comes with the package."""
    data = open_idx_folder(Path(str(resources.files("job") / "data" / "fashion_mnist")), Lister())
    assert data is not None
    title = "built-in Fashion-MNIST sample"
    return replace(data, layout=BUILT_IN, root=title, class_names=FASHION_CLASSES, numbered=False)


def open_path(path: str | os.PathLike[str], listing: int = CURRENT_LISTING) -> Dataset:
    """Open the data set in ``path``: a file, a folder, or the only sub-folder of one.

    Raises InputNotFound when ``path`` does not exist, DataError when no layout matches.
    """
    root: FilePath = Path(path)
    looked_for = ", ".join(layout.help for layout in LAYOUTS.values())
    if isinstance(root, Path) and not root.exists():
        if is_shard_pattern(str(path)):
            return _open_shards(expand_pattern(str(path)), Path(path).parent, listing)
        raise InputNotFound(f"--data {shown(path)} does not exist")
    if root.is_file() and (data := _open_file(Path(root))):
        return data
    root = as_folder(Path(root))
    if not root.is_dir():
        raise DataError(f"--data {shown(path)} is a file; it takes a folder with {looked_for}")
    data = open_splits(root, listing) or _open_folder(_only_folders(root)[-1], listing, split=False)
    if data is None and isinstance(root, ArchivePath):
        data = _open_shards([Path(path)], Path(path), listing)
    if data is None:
        raise DataError(f"--data {shown(path)} is not a data set; looked for {looked_for}")
    return data


def _open_shards(paths: list[Path], root: Path, listing: int) -> Dataset:
    """Open WebDataset shards; raises DataError if ``paths`` contain no labelled samples."""
    data = open_shards(paths, root, Lister(listing))
    if data is None:
        looked_for = ", ".join(layout.help for layout in LAYOUTS.values())
        raise DataError(f"--data {shown(paths[0])} is not a data set; looked for {looked_for}")
    return replace(data, layout="WebDataset shards")


def as_folder(path: Path) -> FilePath:
    """Return the root of an archive, e.g. food-11.zip; any other path as it is.

    Raises DataError.
    """
    return open_archive(path) if path.is_file() and is_archive(path) else path


def open_splits(root: FilePath, listing: int = CURRENT_LISTING) -> Dataset | None:
    """Open the data set in ``root``, or in its only sub-folder, when its layout names the splits.

    Raises DataError.
    """
    opened = (_open_folder(folder, listing, split=True) for folder in _only_folders(root))
    return next((data for data in opened if data), None)


def open_unlabelled(path: Path) -> Dataset:
    """Open an image file, or all images below a folder, as a split ``testing`` without labels.

    Raises InputNotFound or DataError.
    """
    if not path.exists():
        raise InputNotFound(f"--data {shown(path)} does not exist")
    lister, folder = Lister(), as_folder(path)
    root: FilePath = folder
    if isinstance(folder, ArchivePath):
        names = lister.images_below(folder)
    elif folder.is_dir():
        names = [os.path.relpath(p, folder.name) for p in lister.images_below(folder)]
    else:
        root, names = path.parent, [path.name]
    if not names:
        notes = "".join(f"; {note}" for note in lister.notes())
        raise DataError(f"--data {shown(path)} holds no images{notes}")
    splits = {"testing": FileSplit.unlabelled(root, names)}
    return Dataset(shown(path), (), splits, layout=IMAGES_ONLY, notes=lister.notes())


def is_data_file(path: Path) -> bool:
    """Return whether a file has the suffix of a data set, e.g. .csv."""
    suffixes = tuple(layout.suffix for layout in LAYOUTS.values() if layout.suffix)
    return path.name.lower().endswith(suffixes)


def has_numbered_files(data: Dataset) -> bool:
    """Return whether the test images of this layout may be named by their Kaggle ids."""
    return data.layout in LAYOUTS and LAYOUTS[data.layout].numbered_files


def _open_file(path: Path) -> Dataset | None:
    for name, layout in LAYOUTS.items():
        if layout.open_file and path.name.lower().endswith(layout.suffix):
            return replace(layout.open_file(path), layout=name)
    return None


def _open_folder(root: FilePath, listing: int, *, split: bool) -> Dataset | None:
    """Try the layouts with splits, or those without."""
    for name, layout in LAYOUTS.items():
        if layout.has_splits is split and (data := layout.open_folder(root, Lister(listing))):
            return replace(data, layout=name)
    return None


def _only_folders(root: FilePath) -> list[FilePath]:
    """Return ``root``, its only sub-folder and that folder's only sub-folder, if they exist."""
    folders = [root]
    while len(folders) < MAX_DEPTH and len(names := subfolders(folders[-1])) == 1:
        folders.append(folders[-1] / names[0])
    return folders
