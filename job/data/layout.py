"""Recognise what kind of data set a folder holds, and list its splits.

Three layouts: Food-11 (``training/3_45.jpg``), class folders (``train/cat/x.jpg``), IDX files
(``train-images-idx3-ubyte.gz``). Class numbers come from a file's own name, never from its path.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from job.data.dataset import UNLABELLED, ArraySplit, Dataset, FileSplit, Labels, Split
from job.data.idx import read_idx
from job.data.images import SUFFIXES
from job.errors import DataError, InputNotFound, reading, shown

SPLIT_NAMES = {
    "training": ("training", "train"),
    "validation": ("validation", "valid", "val"),
    "testing": ("testing", "test"),
    "evaluation": ("evaluation", "eval"),
}
_CANONICAL = {alias: name for name, aliases in SPLIT_NAMES.items() for alias in aliases}
_IDX = re.compile(
    r"(?:(?P<prefix>.*)[-_.])?(?P<split>train|validation|valid|val|t10k|test)"
    r"[-_.](?P<kind>images|labels)[-_.]idx\d[-_.](?:ubyte|int)(?:\.gz)?",
    re.IGNORECASE,
)
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
LOOKED_FOR = (
    "Food-11 files (training/3_45.jpg, validation/…, testing/… or evaluation/…), "
    "class folders (train/CLASS/*.jpg, val/CLASS/…, test/CLASS/…), "
    "IDX files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…; gzipped or not)"
)


def open_builtin() -> Dataset:
    """The sample of Fashion-MNIST that comes with the package."""
    data = _open_idx(Path(str(resources.files("job") / "data" / "fashion_mnist")))
    assert data is not None
    title = "built-in Fashion-MNIST sample"
    return replace(data, layout="built-in", root=title, class_names=FASHION_CLASSES, numbered=False)


def open_folder(path: str | os.PathLike[str]) -> Dataset:
    """The data set in ``path``, or in its only sub-folder.

    Raises InputNotFound when there is no such folder, DataError when it is of no known layout.
    """
    root = Path(path)
    if not root.exists():
        raise InputNotFound(f"--data {shown(path)} does not exist")
    if not root.is_dir():
        raise DataError(f"--data {shown(path)} is a file; it takes a folder with {LOOKED_FOR}")
    inside = root
    for _ in range(3):
        found = _open_idx(inside) or _open_split_folders(inside)
        if found:
            return found
        folders = [entry for entry in _visible(inside) if (inside / entry).is_dir()]
        if len(folders) != 1:
            break
        inside /= folders[0]
    raise DataError(f"--data {shown(path)} is no data set; looked for {LOOKED_FOR}")


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts 2.jpg before 10.jpg."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def _visible(folder: Path) -> list[str]:
    try:
        with reading(folder):
            names = os.listdir(folder)
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be read: {error.strerror}") from error
    return sorted(name for name in names if not name.startswith("."))


def _pictures(folder: Path) -> list[str]:
    return [name for name in _visible(folder) if name.lower().endswith(SUFFIXES)]


def _open_split_folders(root: Path) -> Dataset | None:
    folders: dict[str, str] = {}
    for entry in _visible(root):
        name = _CANONICAL.get(entry.lower())
        if name and (root / entry).is_dir():
            if name in folders:
                raise DataError(
                    f"{shown(root)} has two {name} folders, {folders[name]} and {entry}: keep one"
                )
            folders[name] = entry
    classes = {name: _class_folders(root / folder) for name, folder in folders.items()}
    flat = {name: _pictures(root / folder) for name, folder in folders.items()}
    if any(classes.values()):
        return _from_class_folders(root, folders, classes, flat)
    if any(flat.values()):
        return _from_flat_files(root, folders, flat)
    return None


def _class_folders(folder: Path) -> dict[str, list[str]]:
    """Pictures below each sub-folder, as paths relative to ``folder``; empty ones are left out."""
    found = {}
    for entry in _visible(folder):
        if not (folder / entry).is_dir():
            continue
        below = [os.path.relpath(path, folder) for path in _pictures_below(folder / entry)]
        if below:
            found[entry] = sorted(below, key=natural_key)
    return found


def _pictures_below(folder: Path) -> list[Path]:
    """Pictures in ``folder`` and its visible sub-folders; links are followed, but in no circle."""
    found, seen, root = [], set(), Path(os.path.realpath(folder))
    for place, inside, _ in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        if here in seen or (root != Path(here) and root.is_relative_to(here)):
            inside.clear()
            continue
        seen.add(here)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        found += [Path(place, name) for name in _pictures(Path(place))]
    return found


def _from_class_folders(
    root: Path,
    folders: dict[str, str],
    classes: dict[str, dict[str, list[str]]],
    flat: dict[str, list[str]],
) -> Dataset:
    names = tuple(sorted(classes.get("training") or {c for s in classes.values() for c in s}))
    splits: dict[str, Split] = {}
    notes = []
    for split, folder in folders.items():
        if not classes[split]:  # unlabelled pictures for `predict`
            paths = sorted(flat[split], key=natural_key)
            labels: list[int] = [UNLABELLED] * len(paths)
        else:
            if flat[split]:
                notes.append(f"{folder}: {len(flat[split])} pictures outside class folders ignored")
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


def _from_flat_files(root: Path, folders: dict[str, str], flat: dict[str, list[str]]) -> Dataset:
    """Food-11: ``{class}_{idx}.jpg``; a split other than training may have no classes."""
    tokens = {split: [_class_token(name) for name in names] for split, names in flat.items()}
    source = "training" if flat.get("training") else next(s for s in flat if flat[s])
    unnamed = [n for n, t in zip(flat[source], tokens[source], strict=True) if t is None]
    if source == "training" and unnamed:
        raise DataError(
            f"{shown(root / folders[source] / unnamed[0])} has no class in its name: "
            "pictures of the Food-11 layout are called CLASS_NUMBER.jpg, as 3_45.jpg"
        )
    known = _known(tokens, "training", "validation") or _known(tokens, "evaluation")
    known = known or _known(tokens, "testing")
    numbered = any(token.isdecimal() for token in known)
    names = _class_numbers(root, known) if numbered else tuple(sorted(known))
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
    return Dataset("Food-11 files", shown(root), names, splits, numbered=numbered)


def _known(tokens: dict[str, list[str | None]], *splits: str) -> set[str]:
    return {token for split in splits for token in tokens.get(split, ()) if token is not None}


def _class_token(name: str) -> str | None:
    match = re.fullmatch(r"(.+)_[^_]*", Path(name).stem)
    return match[1] if match else None


def _class_numbers(root: Path, tokens: set[str]) -> tuple[str, ...]:
    """Names "0" to "max" for classes given as numbers; raises DataError when some are not."""
    odd = sorted(token for token in tokens if not token.isdecimal())
    if odd:
        raise DataError(
            f"{shown(root)} mixes class numbers with the class name {odd[0]!r}: "
            "files are called CLASS_NUMBER.jpg, as 3_45.jpg"
        )
    highest = max(map(int, tokens))
    if highest >= max(1000, 10 * len(tokens)):
        raise DataError(
            f"{shown(root)} has a picture of class {highest:,} but only {len(tokens)} classes: "
            "classes are numbered from 0, and Food-11 files called CLASS_NUMBER.jpg, as 3_45.jpg"
        )
    return tuple(str(number) for number in range(highest + 1))


def _label(path: Path, token: str | None, index: dict[str, int], numbered: bool) -> int:
    if numbered and token is not None and token.isdecimal():
        token = str(int(token))
        if token not in index:
            raise DataError(f"{shown(path)} is of class {token}; classes: {_some(tuple(index))}")
    return UNLABELLED if token is None else index.get(token, UNLABELLED)


def _file_split(root: Path, folder: str, paths: list[str], labels: list[int]) -> FileSplit:
    relative = tuple(os.path.join(folder, path) for path in paths)  # noqa: PTH118 (odd bytes kept)
    return FileSplit(root, relative, np.array(labels, np.int64))


def _open_idx(root: Path) -> Dataset | None:
    found: dict[tuple[str, str, str], Path] = {}
    for entry in _visible(root):
        match = _IDX.fullmatch(entry)
        if match and (root / entry).is_file():
            alias = match["split"].lower().replace("t10k", "test")
            key = (match["prefix"] or "", _CANONICAL[alias], match["kind"].lower())
            found.setdefault(key, root / entry)
    if not found:
        return None
    prefixes = sorted({prefix for prefix, _, _ in found})
    if len(prefixes) > 1:
        raise DataError(
            f"{shown(root)} holds {len(prefixes)} sets of IDX files ({', '.join(prefixes)}): "
            "move the one to use into a folder of its own"
        )
    splits: dict[str, Split] = {
        name: _idx_split(path, found.get((prefixes[0], name, "labels")))
        for (_, name, kind), path in found.items()
        if kind == "images"
    }
    if not splits:
        raise DataError(f"{shown(root)} has IDX labels but no IDX images")
    labels = {str(n) for s in splits.values() for n in np.unique(s.labels) if n != UNLABELLED}
    names = _class_numbers(root, labels or {"0"})
    return Dataset("IDX files", shown(root), names, splits, numbered=True)


def _idx_split(images_path: Path, labels_path: Path | None) -> ArraySplit:
    images = read_idx(images_path)
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    if not (grey or colour) or images.dtype != np.uint8 or images.size == 0:
        raise DataError(
            f"{shown(images_path)} holds {images.dtype} of shape {images.shape}, not pictures: "
            "(N, height, width) or (N, height, width, 3) of unsigned bytes"
        )
    labels: Labels = np.full(len(images), UNLABELLED, np.int64)
    if labels_path is not None:
        stored = read_idx(labels_path)
        if stored.ndim == 2 and stored.shape[1]:
            stored = stored[:, 0]  # QMNIST: class, writer, …
        if stored.ndim != 1 or stored.dtype.kind not in "iu" or (stored < 0).any():
            raise DataError(
                f"{shown(labels_path)} holds {stored.dtype} of shape {stored.shape}, not labels: "
                "one whole number from 0 a picture"
            )
        if len(stored) != len(images):
            raise DataError(
                f"{shown(labels_path)} has {len(stored):,} labels for {len(images):,} pictures"
            )
        labels = stored.astype(np.int64)
    return ArraySplit(images, labels)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:12]) + (f" … ({len(names)} in all)" if len(names) > 12 else "")
