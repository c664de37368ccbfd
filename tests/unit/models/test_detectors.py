"""Detectors of torchvision: raw outputs for tensors, losses as sums and counts, boxes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

import job
from job.artifacts.export_onnx import onnx_bytes, open_onnx
from job.artifacts.model_card import ModelCard
from job.errors import DataError, UsageError
from job.models.detectors import (
    as_detector,
    detection_losses,
    detector_names,
    detector_preprocessing,
    find_boxes,
    fit_transform,
)
from job.models.factory import build_network
from job.models.weights import load_state
from job.slimming.inputs import tensors_in
from support import coco

NETWORKS = ("ssd", "fcos", "retinanet", "faster_rcnn")
RANDOM = torch.Generator().manual_seed(0)
IMAGES = [torch.rand(3, *sides, generator=RANDOM) for sides in ((50, 60), (64, 48), (55, 55))]
SAMPLE = torch.rand(1, 3, 64, 64)
TARGETS: list[Any] = [
    {"boxes": torch.tensor([[5.0, 5, 25, 30], [20, 20, 44, 40]]), "labels": torch.tensor([1, 2])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    {"boxes": torch.tensor([[10.0, 8, 30, 30]]), "labels": torch.tensor([2])},
]
for number, target in enumerate(TARGETS):
    target["seed"] = 2**52 + number


def build(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return as_detector(name, getattr(coco, name)(3), **more)


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_boxes_are_those_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    plain, network = getattr(coco, name)(3), build(name)
    network.load_state_dict(plain.state_dict())
    loss, count = detection_losses(network.train(), IMAGES, TARGETS)
    assert count if name == "fcos" else count > 0
    if name != "faster_rcnn":  # its samples are drawn at random
        expected = sum(plain.train()(IMAGES, TARGETS).values())
        torch.testing.assert_close(loss / count, expected)
    found = find_boxes(network.eval(), IMAGES)
    for one, other in zip(found, network(IMAGES), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "labels", "scores"))
    raw = network(torch.rand(2, 3, 64, 64))
    assert all(len(t) in (2, 2 * 85) for t in tensors_in(raw) if t.dim())


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_of_parts_add_up_to_those_of_the_batch(name: str) -> None:
    """In eval mode, where images share no statistics."""
    network = build(name).eval()
    with torch.no_grad():
        loss, count = detection_losses(network, IMAGES, TARGETS)
        parts = [detection_losses(network, [i], [t]) for i, t in zip(IMAGES, TARGETS, strict=True)]
    assert sum(int(part) for _, part in parts) == int(count)
    assert not network.training
    total = torch.stack([part for part, _ in parts]).sum()
    # alone, an image is padded less; the samples of the second stage are few here
    near = {"faster_rcnn": 0.2, "fcos": 1e-2, "retinanet": 1e-2}.get(name, 1e-5)
    torch.testing.assert_close(total, loss, rtol=near, atol=0)


def test_samples_depend_on_the_seed_of_the_target_alone() -> None:
    network = build("faster_rcnn").eval()
    network.roi_heads.fg_bg_sampler.sampler.batch_size_per_image = 6
    again = [target | {"seed": 5} for target in TARGETS]

    def loss(targets: Any) -> float:
        torch.rand(int(torch.randint(5, ())))  # the state of torch's generator does not matter
        with torch.no_grad():
            return float(detection_losses(network, IMAGES, targets)[0])

    assert loss(TARGETS) == loss(TARGETS)
    assert loss(TARGETS) != loss(again)


def test_a_detector_is_copied_and_pickled() -> None:
    network = build("faster_rcnn", frozen=True).eval()
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert type(other) is type(network)
        assert other.frozen_batchnorm
        assert torch.equal(other(SAMPLE)["scores"], network(SAMPLE)["scores"])


def test_frozen_batchnorms_do_not_change_in_training() -> None:
    network = build("ssd", frozen=True).train()
    norm = network.backbone.eight[1]
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    detection_losses(network, IMAGES, TARGETS)[0].backward()
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert norm.weight.grad is None
    assert network.backbone.eight[0].weight.grad is not None
    narrow, _ = job.slim(network.eval(), torch.rand(1, 3, 64, 64), target="channels=0.5")
    assert not narrow.train().backbone.eight[1].training
    assert not narrow.backbone.eight[1].weight.requires_grad


def test_the_size_of_images_is_that_of_the_network_or_of_the_options() -> None:
    network: Any = build("ssd")
    assert detector_preprocessing(network, None).describe().startswith("small transforms at 64")
    fit_transform(network, 96, (0.5, 0.5, 0.5), None)
    made = detector_preprocessing(network, None)
    assert (made.size, str(made.resize), made.mean) == (96, "96x96", (0.5, 0.5, 0.5))
    assert network.transform([torch.rand(3, 50, 60)])[0].tensors.shape == (1, 3, 96, 96)
    network = build("fcos")
    fit_transform(network, 48, None, None)
    assert network.transform([torch.rand(3, 60, 90)])[0].tensors.shape == (1, 3, 64, 96)
    assert str(detector_preprocessing(network, None).resize) == "48"


def test_networks_are_built_by_name_and_others_are_refused() -> None:
    network = build_network(
        "ssdlite320_mobilenet_v3_large", 3, {"frozen_batchnorm": True}, detector=True
    )
    assert network.frozen_batchnorm
    assert "fcos_resnet50_fpn" in detector_names()
    with pytest.raises(UsageError, match=r"is no detector; did you mean fcos_resnet50_fpn\?"):
        build_network("fcos_resnet50", 3, {}, detector=True)
    with pytest.raises(UsageError, match=r"is no detector.*: --task detection takes a detector of"):
        build_network("resnet18", 3, {}, detector=True)
    masks = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(UsageError, match="nets:masks is a MaskRCNN: --task detection takes"):
        as_detector("nets:masks", masks)
    with pytest.raises(UsageError, match="nets:cnn is a Linear: --task detection takes"):
        as_detector("nets:cnn", nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["ssd", "fcos"])
def test_the_raw_outputs_of_a_cut_detector_are_exported_to_onnx(name: str) -> None:
    wide = build(name).eval()
    narrow, _ = job.slim(wide, SAMPLE, target="channels=0.5")
    made = detector_preprocessing(narrow, None)
    classes = ("__background__", "disc", "square")
    card = ModelCard("nets:own", {}, 3, class_names=classes, preprocessing=made, task="detection")
    content, how = onnx_bytes(narrow, card)
    assert "onnxruntime gives the same logits" in how
    found = open_onnx(content)(SAMPLE)
    with torch.no_grad():
        raw = narrow(SAMPLE)
    torch.testing.assert_close(found[..., :3], raw["cls_logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[..., 3:7], raw["bbox_regression"], atol=1e-4, rtol=1e-4)
    assert found.shape[2] == (8 if name == "fcos" else 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_for_other_classes_are_loaded_without_the_classifier(name: str) -> None:
    """As with the weights of COCO; those with frozen BatchNorms lack its counters."""
    state = getattr(coco, name)(9).state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    network = build(name)
    with pytest.raises(DataError, match="they are for another number of classes"):
        load_state(network, state, "coco.pt")
    loaded = load_state(network, state, "coco.pt", replace_head=True)
    assert loaded.replaced_head
    assert "starts from random weights" in loaded.notes[-1]
    own = network.state_dict()
    same = [key for key in state if own[key].shape == state[key].shape]
    assert all(torch.equal(own[key], state[key]) for key in same)
    assert len(state) - len(same) <= 4


def test_a_two_stage_detector_is_not_exported_as_a_program() -> None:
    network: Any = build("faster_rcnn").eval()
    card = ModelCard(
        "nets:own", {}, 3, preprocessing=detector_preprocessing(network, None), task="detection"
    )
    with pytest.raises(UsageError, match="a Faster R-CNN cannot be exported as a program"):
        onnx_bytes(network, card)
