"""Data sets as COCO lays them out: images, and their boxes in JSON files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from job.data.folders import Lister, subfolders, visible
from job.data.split_names import CANONICAL
from job.errors import DataError, InputNotFound, reading, reason, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

COCO_DATA = (
    "a folder as COCO has it: annotations/instances_train.json, instances_val.json, … and the "
    "images in train, val, … or images; or train and val with a JSON file each"
)
SPLIT_FILES = ("_annotations.coco.json", "annotations.json", "instances.json")  # next to images
BACKGROUND, UNUSED = "__background__", "N/A"  # class names, as torchvision's weights have them
MAX_VALUE = 1e7  # pixels, of the sides of a box


@dataclass(frozen=True)
class ObjectBox:
    """A box in pixels: its corners, the id of its category, and whether it holds a crowd."""

    corners: tuple[float, float, float, float]  # left, top, right, bottom
    category: int
    crowd: bool


@dataclass(frozen=True)
class AnnotatedImage:
    """An image of a JSON file: its path relative to the data, (width, height) if known, boxes."""

    id: int
    path: str
    size: tuple[int, int] | None
    boxes: tuple[ObjectBox, ...]


@dataclass(frozen=True)
class Annotations:
    """The content of a JSON file; ``categories`` are names by id."""

    file: Path
    images: tuple[AnnotatedImage, ...]
    categories: Mapping[int, str]


def read_coco(root: Path) -> dict[str, Annotations]:
    """Return the annotations of each split; raises InputNotFound or DataError."""
    files = find_files(root)
    base = root.parent if root.is_file() else root
    found = {name: read_annotations(file, base) for name, file in files.items()}
    names = found.get("training", next(iter(found.values()))).categories
    for each in found.values():
        for number, name in each.categories.items():
            if names.get(number) != name:
                other = names.get(number, "nothing")
                raise DataError(
                    f"{shown(each.file)} has the category {number}, {shown(name)}, which is "
                    f"{shown(other)} in the training split"
                )
    return found


def find_files(root: Path) -> dict[str, Path]:
    """Return the JSON file of each split; raises InputNotFound or DataError."""
    if not root.exists():
        raise InputNotFound(f"--data {shown(root)} does not exist")
    if root.is_file():
        return {"training": root}
    folder = root / "annotations" if "annotations" in subfolders(root) else root
    names = [name for name in visible(folder) if name.lower().endswith(".json")]
    names = [name for name in names if name.startswith("instances")] or names
    found: dict[str, Path] = {}
    for name in names:
        if split := _split_of(name):
            if split in found:
                first = found[split].name
                raise DataError(
                    f"{shown(folder)} has two {split} files, {shown(first)} and {shown(name)}: "
                    "keep one"
                )
            found[split] = folder / name
    if not found and len(names) == 1:
        return {"training": folder / names[0]}
    if not found:
        for split, inside in Lister().split_folders(root).items():
            file = next((inside / n for n in SPLIT_FILES if (inside / n).is_file()), None)
            found |= {split: Path(file)} if file else {}
    if not found:
        raise DataError(f"--data {shown(root)} has no JSON file of boxes: give {COCO_DATA}")
    return found


def _split_of(name: str) -> str | None:
    """Return the split of a file by its name, e.g. instances_train2017.json."""
    return CANONICAL.get(re.sub(r"[0-9]+$", "", _tail(name)).lower())


def _tail(name: str) -> str:
    """Return the end of a name: train2017 of instances_train2017.json."""
    return re.split(r"[_.-]", Path(name).stem)[-1]


def read_annotations(file: Path, root: Path) -> Annotations:
    """Read a JSON file, whose images are in a folder of ``root``; raises DataError."""
    try:
        with reading(file):
            content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{shown(file)} cannot be read as JSON: {reason(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{shown(file)} is not a COCO file: it has no images and annotations")
    names = _categories(file, _entries(file, content, "categories"))
    boxes: dict[int, list[ObjectBox]] = {}
    for entry in _entries(file, content, "images"):
        number = _whole(file, entry, "id")
        if number in boxes:
            raise DataError(f"{shown(file)} has two images with the id {number}")
        boxes[number] = []
    for entry in _entries(file, content, "annotations"):
        image, box = _whole(file, entry, "image_id"), _box(file, entry)
        if image not in boxes:
            raise DataError(f"{shown(file)} has a box in the image {image}, which it does not list")
        if box.category not in names:
            raise DataError(
                f"{shown(file)} has a box of the category {box.category}, which it does not list"
            )
        boxes[image].append(box)
    images = _images(file, root, _entries(file, content, "images"), boxes)
    return Annotations(file, tuple(images), names)


def _entries(file: Path, content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the list of objects ``key`` of a file."""
    entries = content.get(key)
    if not isinstance(entries, list) or any(not isinstance(entry, dict) for entry in entries):
        raise DataError(f"{shown(file)} is not a COCO file: {key!r} must be a list of objects")
    if not entries and key != "annotations":
        raise DataError(f"{shown(file)} has no {key}")
    return entries


def _whole(file: Path, entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key)
    if type(value) is not int or abs(value) >= 2**63:
        raise DataError(f"{shown(file)}: {key!r} must be a whole number; got {_short(value)}")
    return value


def _text(file: Path, entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise DataError(f"{shown(file)}: {key!r} must be a text; got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = shown(repr(value))
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _categories(file: Path, entries: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in entries:
        number, name = _whole(file, entry, "id"), _text(file, entry, "name")
        if number in names or name in names.values():
            raise DataError(f"{shown(file)} has two categories {number}, {shown(name)}")
        names[number] = name
    return dict(sorted(names.items()))


def _box(file: Path, entry: Mapping[str, Any]) -> ObjectBox:
    """Return a box; raises DataError unless it has a place, a category, and a size."""
    values, where = entry.get("bbox"), f"{shown(file)}, annotation {_short(entry.get('id'))}"
    numbers = [v for v in values if type(v) in (int, float)] if isinstance(values, list) else []
    if len(numbers) != 4 or len(values or ()) != 4:
        raise DataError(f"{where}: 'bbox' must be left, top, width, height; got {_short(values)}")
    if not all(abs(v) <= MAX_VALUE for v in numbers) or min(numbers[2:]) < 0:  # nor NaN
        raise DataError(f"{where}: 'bbox' is {_short(values)}: a size cannot be negative or huge")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"{where}: 'iscrowd' is {_short(crowd)}: 0 or 1")
    left, top, width, height = map(float, numbers)
    category = _whole(file, entry, "category_id")
    return ObjectBox((left, top, left + width, top + height), category, bool(crowd))


def _images(
    file: Path,
    root: Path,
    entries: list[Mapping[str, Any]],
    boxes: Mapping[int, list[ObjectBox]],
) -> Iterator[AnnotatedImage]:
    names = [_image_name(file, entry) for entry in entries]
    folder = _image_folder(file, root, names[0])
    for entry, name in zip(entries, names, strict=True):
        number, path = int(entry["id"]), folder / name
        if not path.is_file():
            raise DataError(f"{shown(file)} lists {shown(name)}, which {shown(folder)} lacks")
        sides = tuple(entry.get(key) for key in ("width", "height"))
        known = all(type(side) is int for side in sides)
        size: Any = sides if known else None
        yield AnnotatedImage(number, str(path.relative_to(root)), size, tuple(boxes[number]))


def _image_name(file: Path, entry: Mapping[str, Any]) -> str:
    """Return the name of an image; raises DataError for one outside of its folder."""
    name = _text(file, entry, "file_name")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{shown(file)} names an image outside of the data: {_short(name)}")
    return str(path)


def _image_folder(file: Path, root: Path, name: str) -> Path:
    """Return the folder that has the image ``name`` of a file; raises DataError."""
    split, tail = _split_of(file.name), _tail(file.name)
    own = [tail, *(entry for entry in subfolders(root) if CANONICAL.get(entry.lower()) == split)]
    inside = root / "images"
    within = subfolders(inside) if inside.is_dir() else []
    own += [f"images/{e}" for e in within if e == tail or CANONICAL.get(e.lower()) == split]
    places = file.parent, *(root / each for each in own), inside, root, file.parent / "images"
    for place in places:
        if (place / name).is_file():
            return place
    tried = ", ".join(dict.fromkeys(shown(place) for place in places if place.is_dir()))
    raise DataError(f"{shown(file)} lists {shown(name)}, which is in none of {tried}")


def labels_of(categories: Mapping[int, str]) -> dict[int, int]:
    """Return the label of each category, by its id.

    The label is the id itself if all ids are between 1 and twice the number of categories.
    Otherwise labels are numbered from 1. As in torchvision, 0 is the background, so that the labels
    of COCO are those of torchvision's weights.
    """
    if min(categories) >= 1 and max(categories) <= 2 * len(categories):
        return {number: number for number in categories}
    return {number: label for label, number in enumerate(categories, 1)}


def class_names_of(categories: Mapping[int, str]) -> tuple[str, ...]:
    """Return the name of each label, from 0 for the background."""
    labels = labels_of(categories)
    names = [UNUSED] * (max(labels.values()) + 1)
    names[0] = BACKGROUND
    for number, label in labels.items():
        names[label] = categories[number]
    return tuple(names)
