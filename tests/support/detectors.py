"""What the layers of torchvision's detectors compute, which answer with boxes of any number."""

from __future__ import annotations

from typing import Any

import torch


def one_stage(model: Any, images: torch.Tensor) -> Any:
    """Raw heads of RetinaNet, FCOS, SSD and SSDlite."""
    return model.head(list(model.backbone(images).values()))


def two_stage(model: Any, images: torch.Tensor) -> Any:
    """Raw heads of Faster and Mask R-CNN, for two boxes in each image."""
    features = model.backbone(images)
    proposals = model.rpn.head(list(features.values()))
    height, width = images.shape[-2:]
    boxes = images.new_tensor([[0.0, 0.0, width / 2, height / 2], [4.0, 4.0, width, height]])
    sizes, heads = [(height, width)] * len(images), model.roi_heads
    args = features, [boxes] * len(images), sizes
    found = heads.box_predictor(heads.box_head(heads.box_roi_pool(*args)))
    if not heads.has_mask():
        return proposals, found
    return proposals, found, heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(*args)))
