"""Detectors and segmenters: cut, proven on their raw outputs, trained a step, exported to ONNX."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import onnxruntime
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

import job
from job.errors import UsageError
from job.slimming.inputs import tensors_in
from support.cuts import randomise
from support.dense_networks import C3, C3k2, HighResolution, TwoPaths, UNet, Yolo
from support.detectors import one_stage, two_stage
from support.masked import masked_network, outputs64

IMAGES = torch.rand(2, 3, 64, 64)
NETWORKS: dict[str, Any] = {
    "YOLOv5": partial(Yolo, C3),
    "YOLOv8": Yolo,
    "YOLO11": partial(Yolo, C3k2),
    "U-Net": UNet,
    "HRNet": HighResolution,
    "BiSeNet": TwoPaths,
}


def made(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make())


def train_a_step(network: nn.Module, images: torch.Tensor, forward: Any = None) -> None:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    before = [p.detach().clone() for p in network.parameters() if p.requires_grad]
    outputs = forward(network, images) if forward else network(images)
    sum(t.square().mean() for t in tensors_in(outputs)).backward()  # type: ignore[union-attr]
    optimizer.step()
    after = [p for p in network.parameters() if p.requires_grad]
    assert not all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_small_ones_are_cut_to_a_third(name: str) -> None:
    network = made(NETWORKS[name])
    narrow, plan = job.slim(network, IMAGES[:1], target="channels=0.4")
    assert plan.after.params < 0.35 * plan.before.params
    expected = outputs64(masked_network(network, plan.layers), IMAGES)
    for one, other in zip(outputs64(narrow, IMAGES), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
    train_a_step(narrow, IMAGES)


class Tensors(nn.Module):
    """The outputs as a list: ONNX has no dataclasses."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return list(tensors_in(self.network(images)))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore")
def test_they_are_exported_to_onnx(name: str) -> None:
    narrow, _ = job.slim(made(NETWORKS[name]), IMAGES[:1])
    file = io.BytesIO()
    torch.onnx.export(Tensors(narrow).eval(), (IMAGES,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    found = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    with torch.no_grad():
        expected = next(tensors_in(narrow(IMAGES)))
    assert torch.allclose(torch.from_numpy(found[0]), expected, rtol=1e-3, atol=1e-4)


SEGMENTERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50")
ONE_STAGE = (
    "ssdlite320_mobilenet_v3_large",
    "retinanet_resnet50_fpn",
    "ssd300_vgg16",
    "fcos_resnet50_fpn",
)
TWO_STAGE = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
)
FORWARD = dict.fromkeys(ONE_STAGE, one_stage) | dict.fromkeys(TWO_STAGE, two_stage)


@pytest.mark.parametrize("name", [*SEGMENTERS, *ONE_STAGE, *TWO_STAGE])
@pytest.mark.sampled(5)
def test_those_of_torchvision_are_cut(name: str) -> None:
    torch.manual_seed(0)
    build = torchvision.models.get_model_builder(name)
    network = build(weights=None, weights_backbone=None, num_classes=5).eval()
    size = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}.get(name, 64)
    images, forward = torch.rand(2, 3, size, size), FORWARD.get(name)
    narrow, plan = job.slim(network, images[:1], target="channels=0.5", forward=forward)
    assert plan.after.params < (0.95 if name in TWO_STAGE else 0.5) * plan.before.params
    assert plan.proof.precision == "float64"
    train_a_step(narrow, images, forward)
    with torch.no_grad():
        found = narrow(images if forward is None else list(images))
    assert all(t.isfinite().all() for t in tensors_in(found))
    if forward is None:
        assert found["out"].shape == (2, 5, size, size)


class Boxes(nn.Module):
    """A detector that answers with as many boxes as it finds, and a list of dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        maps = self.head(self.body(torch.stack(list(images)))).flatten(2).mT
        return [{"boxes": m[m[:, 4] > 9, :4], "scores": m[m[:, 4] > 9, 4]} for m in maps]


def raw(network: Any, images: torch.Tensor) -> torch.Tensor:
    return network.head(network.body(images))


def test_a_network_that_answers_with_boxes_is_cut_by_its_raw_outputs() -> None:
    network = made(Boxes)
    attributes = dict(vars(network))
    with pytest.raises(UsageError, match="answers with boxes, call slim in Python with forward="):
        job.slim(network, [[torch.rand(3, 16, 16)]])
    batches = [torch.rand(8, 3, 16, 16)]
    narrow, plan = job.slim(
        network, IMAGES[:1], forward=raw, calibration=batches, recalibrate=1, recover=1
    )
    assert vars(network).keys() == attributes.keys() == vars(narrow).keys()
    assert narrow.get_parameter("head.weight").shape[1] < 12
    assert narrow([torch.rand(3, 16, 16)])[0]["boxes"].shape[1] == 4
    assert plan.example is None
    measured = job.sensitivity(network, IMAGES[:1], calibration=batches, forward=raw)
    assert [row.channels for row in measured.rows] == [12]
    same = job.apply(made(Boxes), plan, IMAGES, forward=raw)
    same.load_state_dict(narrow.state_dict())
    with pytest.raises(UsageError, match="the plan has no example: give one"):
        job.apply(network, plan, forward=raw)
    assert vars(network).keys() == attributes.keys()


def test_forward_may_call_the_network_and_what_it_replaces_comes_back() -> None:
    network = made(UNet)
    own = network.forward
    vars(network)["forward"] = lambda images: own(images) * 2  # as some libraries patch it

    def doubled(model: nn.Module, images: torch.Tensor, scale: float = 1.0) -> Any:
        return {"a": model(images) * scale, "b": [model(images.flip(-1))]}

    narrow, _ = job.slim(network, {"images": IMAGES, "scale": 2.0}, forward=doubled)
    assert network(IMAGES).equal(own(IMAGES) * 2)
    assert narrow(IMAGES).shape == (2, 2, 64, 64)
    with pytest.raises(UsageError, match="does not run on"):
        job.slim(network, IMAGES, forward=lambda model, images: model(images).nothing)
    assert network(IMAGES).equal(own(IMAGES) * 2)
    with pytest.raises(UsageError, match="forward must be a function of the network"):
        job.slim(network, IMAGES, forward="raw")  # type: ignore[arg-type]


class Pooled(nn.Module):
    """Boxes of two levels, pooled into one tensor, as MultiScaleRoIAlign does, and a warped map."""

    def __init__(self, *, shifted: bool = False) -> None:
        super().__init__()
        self.body, self.down = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 10, 3, 2, 1)
        self.head, self.dense, self.shifted = nn.Linear(10, 4), nn.Conv2d(10, 2, 1), shifted

    def forward(self, images: torch.Tensor) -> Any:
        fine = self.body(images).relu()
        deep = self.down(fine).relu()
        boxes = images.new_tensor([[0, 0.0, 0, 8, 8], [1, 4.0, 4, 16, 12], [0, 1.0, 2, 9, 9]])
        pooled = torch.zeros(3, fine.shape[1], 3, 3, dtype=images.dtype, device=images.device)
        for level, places in ((fine, [0, 2]), (deep, [1])):
            index = torch.tensor(places, device=images.device)
            pooled[index] = roi_align(level, boxes[index], 3)
        if self.shifted:
            pooled[:, :3] = pooled[:, 3:6]
        grid = F.affine_grid(
            torch.eye(2, 3).to(images)[None].expand(2, 2, 3), [2, 3, 9, 9], align_corners=False
        )
        warped = F.grid_sample(fine, grid, align_corners=False)
        return self.head(pooled.mean((2, 3))), self.dense(warped)


@pytest.mark.parametrize("shifted", [False, True])
def test_channels_pass_boxes_samples_and_assignments_to_rows(shifted: bool) -> None:
    network = made(partial(Pooled, shifted=shifted))
    if shifted:
        with pytest.raises(UsageError, match="cannot be reached"):
            job.slim(network, IMAGES)
        return
    narrow, plan = job.slim(network, IMAGES)
    assert {name: len(kept) for name, kept in plan.groups.items()} == {"body": 3}
    expected = outputs64(masked_network(network, plan.layers), IMAGES)
    for one, other in zip(outputs64(narrow, IMAGES), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
