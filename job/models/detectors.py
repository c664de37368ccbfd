"""Detectors of torchvision: what their layers compute, their losses, and the boxes they find.

A detector that ``as_detector`` prepares is called as in torchvision with a list of images: it
returns its losses in train mode, and boxes in eval mode. With a batch of inputs (B, 3, H, W) it
returns what its layers compute, without a variable number of boxes: this is cut and exported.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from job.data.geometry import Resize
from job.data.preprocessing import Preprocessing
from job.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from job.data.geometry import Channels

FAMILIES = ("fasterrcnn", "fcos", "retinanet", "ssd")  # beginnings of names in torchvision
FROZEN = "frozen_batchnorm"  # the --model-arg that keeps statistics, γ and β of the backbone
GRIDS = (1, 2, 4, 8)  # boxes along each side of an image, on which a second stage is measured
LONGEST = 1333 / 800  # longest side relative to the shorter one, as torchvision's detectors have
DETECTOR_HELP = (
    "a detector of torchvision, e.g. ssdlite320_mobilenet_v3_large, or your own as module:factory "
    "that returns torchvision's SSD, RetinaNet, FCOS or FasterRCNN with any backbone"
)


def detector_names() -> list[str]:
    """Return the names of the detectors of torchvision that need only boxes to train."""
    import torchvision.models as models

    names = models.list_models(module=models.detection)
    return [name for name in names if name.startswith(FAMILIES)]


def as_detector(name: str, network: nn.Module, frozen: bool = False) -> nn.Module:
    """Prepare a detector: ``network(images)`` of a batch (B, 3, H, W) returns raw outputs.

    With ``frozen`` the BatchNorms of its backbone keep their statistics, γ and β in training.
    Samples of boxes are drawn by the seed of each target. Raises UsageError for another network.
    """
    from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
    from torchvision.models.detection.ssd import SSD

    kind: Any = type(network)
    if not isinstance(network, (SSD, RetinaNet, FCOS, FasterRCNN)) or _has_other_heads(network):
        raise UsageError(
            f"--model {name} is a {kind.__name__}: --task detection takes {DETECTOR_HELP}; other "
            "networks are trained by your own --task module:factory"
        )
    detector: Any = network
    detector.__class__ = _detector_class(kind)
    detector.frozen_batchnorm = frozen
    if isinstance(network, FasterRCNN):
        for number, part in enumerate((detector.rpn, detector.roi_heads)):
            known = part.fg_bg_sampler
            args = known.batch_size_per_image, known.positive_fraction
            part.fg_bg_sampler = SeededSampler(number, *args)
    for parameter in _frozen_parameters(network) if frozen else ():
        parameter.requires_grad_(False)
    return detector  # type: ignore[no-any-return]


def _has_other_heads(network: nn.Module) -> bool:
    """Return whether a two-stage detector also predicts masks or keypoints."""
    heads: Any = getattr(network, "roi_heads", None)
    return heads is not None and bool(heads.has_mask() or heads.has_keypoint())


@cache
def _detector_class(kind: Any) -> Any:
    """Return a subclass of a class of detectors, of the same name, that also takes a batch."""
    return type(kind.__name__, (_Detector, kind), {"__module__": kind.__module__})


def _new_detector(kind: Any) -> Any:
    made = _detector_class(kind)
    return made.__new__(made)


class _Detector(nn.Module):
    """Mixin for detectors that returns raw outputs if a batch of inputs replaces the image list."""

    frozen_batchnorm = False

    def __reduce__(self) -> Any:
        """Make the detector picklable for other processes: its class has no importable name."""
        return _new_detector, (type(self).__bases__[1],), vars(self)

    def forward(self, images: Any, targets: Any = None) -> Any:
        """Map inputs (B, 3, H, W) to raw outputs, a list of images to losses or boxes."""
        if isinstance(images, torch.Tensor):
            return raw_outputs(self, images)
        return super().forward(images, targets)

    def train(self, mode: bool = True) -> Any:
        """Set the mode; frozen BatchNorms stay in eval mode."""
        super().train(mode)
        for norm in _batchnorms(self) if self.frozen_batchnorm else ():
            norm.eval()
        return self


def _batchnorms(network: Any) -> list[nn.Module]:
    return [m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d)]


def _frozen_parameters(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for norm in _batchnorms(network) for parameter in norm.parameters()]


def raw_outputs(detector: Any, inputs: torch.Tensor) -> Any:
    """Return what the heads of a detector compute for inputs (B, 3, H, W).

    The second stage of Faster R-CNN is computed for fixed boxes, 85 in each image: its proposals
    depend on the weights, so that networks with and without some channels could not be compared.
    """
    features = detector.backbone(inputs)
    if isinstance(features, torch.Tensor):
        features = OrderedDict([("0", features)])
    if not hasattr(detector, "roi_heads"):
        return detector.head(list(features.values()))
    heads, (height, width) = detector.roi_heads, inputs.shape[-2:]
    objectness, deltas = detector.rpn.head(list(features.values()))
    boxes = grid_boxes(inputs, height, width)
    if inputs.device.type != "meta":
        pooled = heads.box_roi_pool(
            features, [boxes] * len(inputs), [(height, width)] * len(inputs)
        )
    else:  # box pooling reads values
        channels, sides = next(iter(features.values())).shape[1], heads.box_roi_pool.output_size
        pooled = inputs.new_zeros(len(inputs) * len(boxes), channels, *sides)
    scores, shifts = heads.box_predictor(heads.box_head(pooled))
    return {"objectness": objectness, "deltas": deltas, "scores": scores, "boxes": shifts}


def joined_outputs(raw: Any) -> torch.Tensor:
    """Return the raw outputs of a one-stage detector as one tensor (B, anchors, C + 4 or 5).

    For each anchor: the logits of the C classes, four numbers of its box and, of FCOS, centerness.
    Raises UsageError for a two-stage detector.
    """
    if "cls_logits" not in raw:
        raise UsageError(
            "a Faster R-CNN cannot be exported as a program of fixed shapes: its second stage "
            "depends on the boxes of the first; give a file of weights, e.g. --output model.pt"
        )
    names = ("cls_logits", "bbox_regression", "bbox_ctrness")
    return torch.cat([raw[name] for name in names if name in raw], -1)


def grid_boxes(inputs: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return boxes (n, 4) that divide an image into 1, 4, 16 and 64 parts."""
    boxes = []
    for side in GRIDS:
        high, wide = height / side, width / side
        boxes += [
            [column * wide, row * high, (column + 1) * wide, (row + 1) * high]
            for row in range(side)
            for column in range(side)
        ]
    return inputs.new_tensor(boxes)


class SeededSampler:
    """Sampler of anchors or proposals like torchvision's, but with a seed for each image.

    The samples of an image therefore do not depend on the batch, the process, or resuming.
    """

    seeds: tuple[int, ...] = ()

    def __init__(self, number: int, batch_size_per_image: int, positive_fraction: float) -> None:
        from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

        self.number = number
        self.sampler = BalancedPositiveNegativeSampler(batch_size_per_image, positive_fraction)

    def __call__(self, matched: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        """Return masks of positive and of negative samples for each image."""
        chosen: tuple[list[torch.Tensor], ...] = [], []
        cuda = {tensor.device for tensor in matched if tensor.device.type == "cuda"}
        seeds = self.seeds if len(self.seeds) == len(matched) else range(len(matched))
        with torch.random.fork_rng(devices=list(cuda)):
            for seed, tensor in zip(seeds, matched, strict=True):
                torch.manual_seed(2 * seed + self.number)
                for kept, (mask,) in zip(chosen, self.sampler([tensor]), strict=True):
                    kept.append(mask)
        return chosen


def detection_losses(
    detector: Any, images: list[torch.Tensor], targets: Sequence[Mapping[str, Any]]
) -> tuple[torch.Tensor, Any]:
    """Return the detector's own losses, as their sum over a batch and the count to divide it by.

    ``images`` are (3, H, W) float32 in [0, 1]; ``targets`` have ``boxes`` (n, 4), ``labels`` (n,),
    and ``seed``. For SSD and FCOS, whose losses are means over matched anchors, the count is the
    number of matched anchors; for other detectors it is the number of images. The gradient of a
    global batch therefore does not depend on how the batch is divided. In eval mode BatchNorms use
    their running statistics.
    """
    parts = [detector]
    if two_stage := hasattr(detector, "roi_heads"):
        parts += [detector.rpn, detector.roi_heads]
        seeds = tuple(int(target["seed"]) for target in targets)
        for part in parts[1:]:
            part.fg_bg_sampler.seeds = seeds
    owner = None if two_stage else _counts_matches(detector)
    with _flagged(parts, True), _counted(owner) as counts:
        losses = detector(images, targets)
    loss = torch.stack([loss.float() for loss in losses.values()]).sum()
    if not counts:
        return loss * len(images), len(images)
    count = torch.stack(counts).sum()
    return loss * count.clamp_min(1), count  # as they divide: by 1 without a match


def find_boxes(detector: Any, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the ``boxes`` (n, 4), ``labels`` (n,) and ``scores`` (n,) of each image."""
    parts = [detector]
    parts += [detector.rpn, detector.roi_heads] if hasattr(detector, "roi_heads") else []
    with _flagged(parts, False):
        found: list[dict[str, torch.Tensor]] = detector(images)
    return found


@contextmanager
def _flagged(parts: list[nn.Module], training: bool) -> Iterator[None]:
    """Make the parts of a detector compute losses or boxes, whatever the mode of its layers."""
    before = [part.training for part in parts]
    for part in parts:
        part.training = training
    try:
        yield
    finally:
        for part, mode in zip(parts, before, strict=True):
            part.training = mode


def _counts_matches(detector: Any) -> Any:
    """Return the module whose method ``compute_loss`` divides by the matched anchors, or None."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.ssd import SSD

    if isinstance(detector, FCOS):
        return detector.head
    return detector if isinstance(detector, SSD) else None


@contextmanager
def _counted(owner: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the number of matched anchors that ``compute_loss`` of ``owner`` receives."""
    counts: list[torch.Tensor] = []
    if owner is None:
        yield counts
        return
    compute: Callable[..., Any] = owner.compute_loss

    def counting(targets: Any, outputs: Any, anchors: Any, matched: list[torch.Tensor]) -> Any:
        counts.extend((each >= 0).sum() for each in matched)
        return compute(targets, outputs, anchors, matched)

    owner.compute_loss = counting
    try:
        yield counts
    finally:
        del owner.compute_loss


def input_sides(detector: Any) -> tuple[int, int]:
    """Return the usual (height, width) of a detector's inputs."""
    transform = detector.transform
    width, height = transform.fixed_size or transform.min_size[-1:] * 2
    return height, width


def fit_transform(
    detector: Any, size: int | None, mean: Channels | None, std: Channels | None
) -> None:
    """Set the input size, mean and standard deviation of a detector; None keeps the current value.

    For SSD, ``size`` is both sides of the inputs. For other detectors it is the shorter side, and
    the longer side is at most LONGEST times as long.
    """
    transform = detector.transform
    if size is not None and transform.fixed_size is not None:
        transform.fixed_size = size, size
    elif size is not None:
        transform.min_size, transform.max_size = (size,), round(size * LONGEST)
    transform.image_mean = list(mean or transform.image_mean)
    transform.image_std = list(std or transform.image_std)


def detector_preprocessing(detector: Any, max_side: int | None) -> Preprocessing:
    """Return the preprocessing that a detector does, for its model card.

    Costs are those of inputs of ``size`` x ``size``, or of the fixed size of its inputs.
    """
    transform, sides = detector.transform, input_sides(detector)
    mean, std = tuple(transform.image_mean), tuple(transform.image_std)
    size = min(sides)
    resize = Resize(size, "both" if transform.fixed_size else "shorter")
    shape = None if sides[0] == sides[1] else (3, *sides)
    return Preprocessing("small", size, resize, "bilinear", mean, std, max_side, shape)


def fit_to_card(detector: Any, preprocessing: Preprocessing) -> None:
    """Set the detector's own resizing to the preprocessing of its model card."""
    size = None if preprocessing.shape else preprocessing.size
    fit_transform(detector, size, preprocessing.mean, preprocessing.std)
