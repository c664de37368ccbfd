"""Semantic segmentation: folders of images, and of masks whose pixels are class numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from job.data.augmentation import MAX_ASPECT_RATIO, center_offset, resampling
from job.data.dataset import Dataset
from job.data.folders import Lister, subfolders
from job.data.geometry import limited_size
from job.data.split_names import CANONICAL
from job.data.splits import FileSplit
from job.errors import DataError, InputNotFound, shown
from job.models.outputs import main_output
from job.tasks.image_task import LabelledImages, prepare_images
from job.tasks.masks import IGNORED, find_values, names_of_values, numbered_mask, read_mask

if TYPE_CHECKING:
    from job.data.geometry import Size
    from job.data.preprocessing import Preprocessing
    from job.data.sample_order import Draw
    from job.tasks.image_task import TaskOptions
    from job.training.task import Metrics

SEGMENTATION = "segmentation"
SEGMENTATION_DATA = (
    "a folder with train/images, train/masks, val/images, val/masks, or images/train, masks/train, "
    "…, or images and masks alone"
)
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "segmentationclass", "gt")
MASK_ENDINGS = ("", "_mask", "_labels", "_gt")  # after the name of an image
AUXILIARY_SHARE = 0.5  # of the loss of a network's output "aux", as in torchvision's reference


@dataclass(frozen=True)
class Pairs:
    """Images of a split, relative to ``root``, and their masks."""

    root: Path
    images: tuple[str, ...]
    masks: tuple[str, ...]


class Segmentation:
    """Images with masks (S, S): cross entropy over pixels, and the mean IoU of classes."""

    def __init__(self, options: TaskOptions) -> None:
        root = Path(options.path(SEGMENTATION, SEGMENTATION_DATA))
        pairs = _find_pairs(root)
        masks: dict[str, str] = {}
        for each in pairs.values():
            masks |= zip(each.images, each.masks, strict=True)
        splits = {
            name: FileSplit(each.root, each.images, np.zeros(len(each.images), np.int64))
            for name, each in pairs.items()
        }
        files, self.preprocessing = prepare_images(Dataset(shown(root), (), splits), options)
        shown_in = find_values(root, files, masks)
        self.values = tuple(shown_in)
        self.class_names, self.caution = names_of_values(root, shown_in)
        self.sets: dict[str, LabelledImages] = {}
        self.fingerprint = ""
        for name, split in files.items():
            paths = tuple(masks[path] for path in split.paths)
            target = Masks(root, paths, self.preprocessing, self.values)
            augment = name == "training"
            self.sets[name] = LabelledImages(split, self.preprocessing, target, augment)
            of_masks = FileSplit(root, paths, split.labels).digest().hex()
            self.fingerprint += split.digest().hex() + of_masks
        self.training, self.validation = self.sets["training"], self.sets["validation"]
        self.testing = self.sets.get("testing") or self.sets.get("evaluation")

    def inputs(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images (B, S, S, 3) uint8 to inputs (B, 3, S, S) float32."""
        return self.preprocessing.to_input(images)

    def loss(self, outputs: Any, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross entropy, summed over the pixels that have a class, and their number."""
        targets = targets.long()
        logits = logits_at(outputs, targets)
        if logits.shape[1] < len(self.class_names):
            raise DataError(
                f"the network returns logits for {logits.shape[1]} classes, but the masks have "
                f"{len(self.class_names)}: give it as many outputs as classes (a factory receives "
                "their number as num_classes)"
            )
        loss = _pixel_loss(logits, targets)
        if torch.is_grad_enabled() and isinstance(outputs, Mapping) and "aux" in outputs:
            auxiliary = _pixel_loss(_resized(outputs["aux"], targets), targets)
            loss = loss + AUXILIARY_SHARE * auxiliary
        return loss, (targets != IGNORED).sum()

    def metrics(self, outputs: Any, targets: torch.Tensor) -> Metrics:
        """Return sums and counts: for the IoU of each class, and the share of correct pixels."""
        logits = logits_at(outputs, targets)
        classes = logits.shape[1]
        known = targets != IGNORED
        true, predicted = targets[known].long(), logits.argmax(1)[known]
        confusion = torch.bincount(true * classes + predicted, minlength=classes**2)
        confusion = confusion.view(classes, classes)
        shared = confusion.diagonal()
        either = confusion.sum(0) + confusion.sum(1) - shared
        return {"miou": (shared, either), "pixel_acc": (shared.sum(), known.sum())}

    def distillation_loss(
        self, outputs: Any, teacher_outputs: Any, temperature: float
    ) -> torch.Tensor:
        """Return T² times the divergence of the classes of pixels, summed (Hinton et al. 2015)."""
        student, teacher = (
            logits_of_pixels(each) / temperature for each in (outputs, teacher_outputs)
        )
        wide, narrow = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
        return temperature**2 * F.kl_div(narrow, wide, log_target=True, reduction="sum")


def logits_of_pixels(outputs: Any) -> torch.Tensor:
    """Return the logits (B, C, H, W) of a network; raises DataError if it has no such output."""
    logits = main_output(outputs)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 4:
        kind = tuple(logits.shape) if hasattr(logits, "shape") else type(logits).__name__
        raise DataError(
            f"the network returns {kind}: --task {SEGMENTATION} needs logits (images, classes, H, "
            "W), e.g. of --model lraspp_mobilenet_v3_large, or your own as module:factory"
        )
    return logits


def logits_at(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, C, H, W) at the size of the masks ``targets`` (B, H, W)."""
    return _resized(logits_of_pixels(outputs), targets)


def _resized(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    size = targets.shape[-2:]
    if logits.shape[-2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _pixel_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True)
class Masks:
    """Targets of a split: masks (S, S) uint8, transformed in the same way as their images."""

    root: Path
    paths: tuple[str, ...]
    preprocessing: Preprocessing
    values: tuple[int, ...]

    def __call__(self, index: int, draw: Draw | None) -> torch.Tensor:
        """Return the mask of an image; pixels that padding adds are IGNORED."""
        mask = numbered_mask(read_mask(self.root / self.paths[index]), self.values)
        # shifted by one, so that zero padding becomes IGNORED; then transformed like the image
        plane = Image.fromarray(mask + np.uint8(1))
        plane = plane.resize(limited_size(plane.size, self.preprocessing.max_side), NEAREST)
        image = Image.merge("RGB", [plane] * 3)
        how = replace(self.preprocessing, interpolation="nearest", mean=(0.0, 0.0, 0.0))
        made = how.train(image, draw) if draw else how.evaluate(image)
        return torch.from_numpy(np.array(made)[..., 0] - np.uint8(1))


def mask_of_image(
    classes: np.ndarray[Any, np.dtype[np.uint8]], size: Size, how: Preprocessing
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the mask (height, width) of an image of ``size`` (width, height).

    ``classes`` (S, S) are those of the crop that evaluation takes of the image; pixels outside of
    the crop are IGNORED.
    """
    places, insides = [], []
    limited = limited_size(size, how.max_side)
    longest = MAX_ASPECT_RATIO * min(limited)
    crops = how.resize.side and how.resize.fit == "shorter"  # then ends of long images are cut
    cut: Any = tuple(min(side, longest) for side in limited) if crops else limited
    resized = how.resize.size_of(cut)
    for axis in (1, 0):
        pixels = (np.arange(size[axis]) + 0.5) * limited[axis] / size[axis]
        pixels = (pixels - (limited[axis] - cut[axis]) // 2) * resized[axis] / cut[axis]
        place = np.floor(pixels).astype(np.int64) - center_offset(resized[axis], how.size)
        inside = (pixels >= 0) & (pixels < resized[axis]) & (place >= 0) & (place < how.size)
        places.append(place[inside])
        insides.append(inside)
    mask = np.full(size[::-1], IGNORED, np.uint8)
    mask[np.ix_(*insides)] = classes[np.ix_(*places)]
    return mask


NEAREST = resampling("nearest")


def _find_pairs(root: Path) -> dict[str, Pairs]:
    """Return the images and masks of each split; raises InputNotFound or DataError."""
    if not root.exists():
        raise InputNotFound(f"--data {shown(root)} does not exist")
    takes = f"--task {SEGMENTATION} takes {SEGMENTATION_DATA}"
    if not root.is_dir():
        raise DataError(
            f"--data {shown(root)} is a file: --task {SEGMENTATION} takes {SEGMENTATION_DATA}"
        )
    own = _named(root, IMAGE_FOLDERS), _named(root, MASK_FOLDERS)
    found: dict[str, Pairs] = {}
    if own[0] and own[1]:
        within = Lister().split_folders(own[0])
        if not within:
            return {"training": _pair(root, own[0], own[1])}
        masks = Lister().split_folders(own[1])
        if missing := sorted(set(within) - set(masks)):
            raise DataError(f"{shown(own[1])} has no masks of the {missing[0]} split")
        return {n: _pair(root, own[0] / within[n].name, own[1] / masks[n].name) for n in within}
    for entry in subfolders(root):
        split, folder = CANONICAL.get(entry.lower()), root / entry
        images, masks_folder = _named(folder, IMAGE_FOLDERS), _named(folder, MASK_FOLDERS)
        if split and images and masks_folder:
            found[split] = _pair(root, images, masks_folder)
    if not found:
        raise DataError(f"--data {shown(root)} has no images with masks: {takes}")
    return found


def _named(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first subfolder with one of ``names``, ignoring case; None without one."""
    entries = {entry.lower(): entry for entry in subfolders(folder)}
    return next((folder / entries[name] for name in names if name in entries), None)


def _pair(root: Path, images: Path, masks: Path) -> Pairs:
    """Pair images and masks by name; raises DataError for an image without a mask."""
    by_name = {Path(name).stem: name for name in Lister().images(masks)}
    names, paired = Lister().images(images), []
    for name in names:
        stem = Path(name).stem
        mask = next((by_name[stem + e] for e in MASK_ENDINGS if stem + e in by_name), None)
        if mask is None:
            raise DataError(f"{shown(images / name)} has no mask {stem}.png in {shown(masks)}")
        paired.append(str((masks / mask).relative_to(root)))
    if not names:
        raise DataError(f"{shown(images)} holds no images")
    paths = tuple(str((images / name).relative_to(root)) for name in names)
    return Pairs(root, paths, tuple(paired))
