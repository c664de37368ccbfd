"""Recognise what kind of data set a folder holds, and list its splits.

Food-11 (``training/3_45.jpg``), class folders (``train/cat/x.jpg``, or ``cat/x.jpg`` without
splits), IDX files (``train-images-idx3-ubyte.gz``), CSV files (``train.csv``). Class numbers come
from a file's own name, never from its path.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from job.data.csv_layout import open_csv_file, open_csv_folder
from job.data.dataset import Dataset
from job.data.folders import CURRENT_LISTING, Lister, natural_key, visible
from job.data.idx_layout import class_numbers, open_idx
from job.data.splits import UNLABELLED, FileSplit, Split
from job.errors import DataError, InputNotFound, shown

BUILT_IN = "built-in"  # as --data
NUMBERED = ("Food-11 files", "class folders", "IDX files")  # whose files may be, for Kaggle
IMAGES = "images"  # any folder of them
UNSPLIT = "class folders without splits"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
LOOKED_FOR = (
    "Food-11 files (training/3_45.jpg, validation/…, testing/… or evaluation/…), "
    "class folders (train/CLASS/*.jpg, val/CLASS/…, test/CLASS/…, or CLASS/*.jpg alone), "
    "IDX files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…; gzipped or not), "
    "a CSV file of paths and labels (train.csv: file,label)"
)


def open_data(path: str | None, listing: int = CURRENT_LISTING) -> Dataset:
    """The data set at ``path``, or the built-in one; raises InputNotFound or DataError.

    Folders are read by the rules of ``listing``.
    """
    if path is None or (path == BUILT_IN and not Path(path).exists()):
        return open_builtin()
    return replace(open_folder(path, listing), source=path, listing=listing)


def open_builtin() -> Dataset:
    """The sample of Fashion-MNIST that comes with the package."""
    data = open_idx(Path(str(resources.files("job") / "data" / "fashion_mnist")))
    assert data is not None
    title = "built-in Fashion-MNIST sample"
    return replace(data, layout="built-in", root=title, class_names=FASHION_CLASSES, numbered=False)


def open_folder(path: str | os.PathLike[str], listing: int = CURRENT_LISTING) -> Dataset:
    """The data set in ``path``, a folder, its only sub-folder, or a CSV file.

    Raises InputNotFound when there is none, DataError when it is of no known layout.
    """
    root = Path(path)
    if not root.exists():
        raise InputNotFound(f"--data {shown(path)} does not exist")
    if root.is_file() and root.suffix.lower() == ".csv":
        return open_csv_file(root)
    if not root.is_dir():
        raise DataError(f"--data {shown(path)} is a file; it takes a folder with {LOOKED_FOR}")
    found = open_splits(root, listing) or _open_class_folders(_inmost(root)[-1], Lister(listing))
    if not found:
        raise DataError(f"--data {shown(path)} is not a data set; looked for {LOOKED_FOR}")
    return found


def open_splits(root: Path, listing: int = CURRENT_LISTING) -> Dataset | None:
    """The data set in the folder ``root``, or its only sub-folder, if it says what its splits are.

    Raises DataError.
    """
    for inside in _inmost(root):
        found = open_idx(inside) or _open_split_folders(inside, Lister(listing))
        if found := found or open_csv_folder(inside):
            return found
    return None


def open_unlabelled(path: Path) -> Dataset:
    """An image file, or all below a folder, as a split ``testing`` without labels.

    Raises InputNotFound or DataError.
    """
    if not path.exists():
        raise InputNotFound(f"--data {shown(path)} does not exist")
    lister = Lister()
    if path.is_dir():
        root, names = path, [os.path.relpath(p, path.name) for p in lister.images_below(path)]
    else:
        root, names = path.parent, [path.name]
    if not names:
        raise DataError(
            f"--data {shown(path)} holds no images{''.join(f'; {n}' for n in lister.notes())}"
        )
    split = _file_split(root, "", names, [UNLABELLED] * len(names))
    return Dataset(IMAGES, shown(path), (), {"testing": split}, notes=lister.notes())


def _inmost(root: Path) -> list[Path]:
    """``root``, its only sub-folder, and that one's."""
    found = [root]
    while len(found) < 3:
        folders = [entry for entry in visible(found[-1]) if (found[-1] / entry).is_dir()]
        if len(folders) != 1:
            break
        found.append(found[-1] / folders[0])
    return found


def _open_split_folders(root: Path, lister: Lister) -> Dataset | None:
    folders: dict[str, str] = {}
    for entry in visible(root):
        name = lister.split(entry)
        if name and (root / entry).is_dir():
            if name in folders:
                raise DataError(
                    f"{shown(root)} has two {name} folders, {folders[name]} and {entry}: keep one"
                )
            folders[name] = entry
    classes = {name: lister.class_folders(root / folder) for name, folder in folders.items()}
    flat = {name: lister.images(root / folder) for name, folder in folders.items()}
    if any(classes.values()):
        return _from_class_folders(root, folders, classes, flat, lister)
    if any(flat.values()):
        return _from_flat_files(root, folders, flat, lister)
    return None


def _open_class_folders(root: Path, lister: Lister) -> Dataset | None:
    """CLASS/*.jpg without splits: all images are training, of which some will be held out."""
    for entry in visible(root):
        if (root / entry).is_dir() and any(
            lister.split(name) and (root / entry / name).is_dir() for name in visible(root / entry)
        ):
            return None  # several data sets
    classes, flat = {"training": lister.class_folders(root)}, {"training": lister.images(root)}
    if len(classes["training"]) < 2:
        return None
    found = _from_class_folders(root, {"training": ""}, classes, flat, lister)
    return replace(found, layout=UNSPLIT)


def _from_class_folders(
    root: Path,
    folders: dict[str, str],
    classes: dict[str, dict[str, list[str]]],
    flat: dict[str, list[str]],
    lister: Lister,
) -> Dataset:
    names = tuple(sorted(classes.get("training") or {c for s in classes.values() for c in s}))
    splits: dict[str, Split] = {}
    notes = [*_order_note(names), *lister.notes()]
    for split, folder in folders.items():
        if not classes[split]:  # unlabelled images for `predict`
            paths = sorted(flat[split], key=natural_key)
            labels: list[int] = [UNLABELLED] * len(paths)
        else:
            if flat[split]:
                place = f"{folder}: " if folder else ""
                notes.append(f"{place}{len(flat[split])} images outside class folders ignored")
            for unknown in sorted(set(classes[split]) - set(names)):
                raise DataError(
                    f"{shown(root / folder / unknown)} is a class that the training split lacks; "
                    f"it has: {_some(names)}"
                )
            paths = [path for name in names for path in classes[split].get(name, [])]
            labels = [i for i, name in enumerate(names) for _ in classes[split].get(name, [])]
        if paths:
            splits[split] = _file_split(root, folder, paths, labels)
    return Dataset("class folders", shown(root), names, splits, notes=tuple(notes))


def _order_note(names: tuple[str, ...]) -> tuple[str, ...]:
    """Said where class folders are numbers and the order is not that of numbers."""
    if not all(name.isdecimal() for name in names) or list(names) == sorted(names, key=int):
        return ()
    place = next(n for n, name in enumerate(names) if name != sorted(names, key=int)[n])
    return (
        f"warning: class folders are numbers, but ordered as text, as torchvision's ImageFolder "
        f"does it ({_some(names)}): class number {place} of the network is folder {names[place]}; "
        "predict writes the folder's name",
    )


def _from_flat_files(
    root: Path, folders: dict[str, str], flat: dict[str, list[str]], lister: Lister
) -> Dataset:
    """Food-11: ``{class}_{idx}.jpg``; a split other than training may have no classes."""
    tokens = {split: [_class_token(name) for name in names] for split, names in flat.items()}
    source = "training" if flat.get("training") else next(s for s in flat if flat[s])
    unnamed = [n for n, t in zip(flat[source], tokens[source], strict=True) if t is None]
    if source == "training" and unnamed:
        raise DataError(
            f"{shown(root / folders[source] / unnamed[0])} has no class in its name: "
            "images of the Food-11 layout are named CLASS_NUMBER.jpg, e.g. 3_45.jpg"
        )
    known = _known(tokens, "training", "validation") or _known(tokens, "evaluation")
    known = known or _known(tokens, "testing")
    numbered = any(token.isdecimal() for token in known)
    names = class_numbers(root, known) if numbered else tuple(sorted(known))
    index = {name: i for i, name in enumerate(names)}
    splits: dict[str, Split] = {}
    for split, folder in folders.items():
        if flat[split]:
            files = sorted(
                zip(flat[split], tokens[split], strict=True), key=lambda f: natural_key(f[0])
            )
            labels = [_label(root / folder / f, token, index, numbered) for f, token in files]
            if UNLABELLED in labels and split in ("training", "validation"):
                odd = files[labels.index(UNLABELLED)][0]
                raise DataError(
                    f"{shown(root / folder / odd)} names no known class; classes: {_some(names)}"
                )
            splits[split] = _file_split(root, folder, [f for f, _ in files], labels)
    return Dataset("Food-11 files", shown(root), names, splits, numbered, lister.notes())


def _known(tokens: dict[str, list[str | None]], *splits: str) -> set[str]:
    return {token for split in splits for token in tokens.get(split, ()) if token is not None}


def _class_token(name: str) -> str | None:
    match = re.fullmatch(r"(.+)_[^_]*", Path(name).stem)
    return match[1] if match else None


def _label(path: Path, token: str | None, index: dict[str, int], numbered: bool) -> int:
    if numbered and token is not None and token.isdecimal():
        token = str(int(token))
        if token not in index:
            raise DataError(f"{shown(path)} is of class {token}; classes: {_some(tuple(index))}")
    return UNLABELLED if token is None else index.get(token, UNLABELLED)


def _file_split(root: Path, folder: str, paths: list[str], labels: list[int]) -> FileSplit:
    relative = tuple(os.path.join(folder, path) for path in paths)  # noqa: PTH118 (odd bytes kept)
    return FileSplit(root, relative, np.array(labels, np.int64))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:12]) + (f" … ({len(names)} in all)" if len(names) > 12 else "")
