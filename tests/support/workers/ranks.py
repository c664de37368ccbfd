"""Run by torchrun in test_processes: what only shows between ranks."""

from __future__ import annotations

import copy
import sys
import types

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from job.cli.process_exit import exit_now
from job.config import PruneConfig
from job.data.preprocessing import Preprocessing
from job.data.splits import ArraySplit
from job.distributed.collectives import check_same, on_main, start
from job.errors import DataError, GammaslimError, UsageError
from job.models.student import StudentNet
from job.processes import rank, world_size
from job.training.evaluation import Evaluator
from job.training.session import RoundSpec
from job.training.sync_batchnorm import (
    average_running_statistics,
    synchronised,
    unsynchronised,
)
from job.training.trainer import Trainer
from job.training.trial import has_unused_parameters


def check_gradients(samples: int) -> None:
    """The gradient of a global batch in float64, for any share of it: an empty one included."""
    torch.manual_seed(0)
    network = StudentNet(num_classes=3).double()
    images = torch.rand(samples, 3, 32, 32, dtype=torch.float64)
    labels = torch.arange(samples) % 3
    whole = copy.deepcopy(network)
    F.cross_entropy(whole(images), labels).backward()
    shared = synchronised(copy.deepcopy(network), torch.device("cpu"))
    wrapped = DistributedDataParallel(shared, broadcast_buffers=False)
    mine = slice(rank(), None, world_size())
    loss = F.cross_entropy(wrapped(images[mine]), labels[mine], reduction="sum")
    (loss * (world_size() / samples)).backward()
    for (name, ours), theirs in zip(shared.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7, msg=name)
    for ours, theirs in zip(shared.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


class Activated(nn.BatchNorm2d):
    """A subclass with its own forward pass."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).add_(0.1)


class Inherited(nn.BatchNorm2d):
    """A subclass without one."""


class Kinds(nn.Module):
    """BatchNorms of every kind, with in-place operations after them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(3),
                nn.BatchNorm2d(3, momentum=None),
                nn.BatchNorm2d(3, affine=False),
                nn.BatchNorm2d(3, track_running_stats=False),
                Inherited(3),
                Activated(3),
                nn.BatchNorm2d(3).eval(),
            ]
        )
        self.norms.append(self.norms[0])  # shared
        self.deep, self.line, self.flat = nn.BatchNorm3d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place, norm in enumerate(self.norms):
            y = norm(x)
            y += x if place % 2 else 1
            x = F.leaky_relu_(y * 0.7, 0.3)
        x = F.leaky_relu_(self.deep(x[:, :, None]), 0.1)[:, :, 0]
        x = F.leaky_relu_(self.line(x.flatten(2)), 0.1).mean(2)
        return self.last(F.leaky_relu_(self.flat(x), 0.1))

    def train(self, mode: bool = True) -> Kinds:
        super().train(mode)
        self.norms[6].eval()  # a frozen one
        return self


def check_kinds(memory_format: torch.memory_format, compiled: bool) -> None:
    """Every kind of BatchNorm over two steps: gradients and statistics of the global batch."""
    torch.manual_seed(1)
    whole = Kinds().double().train()
    shared = copy.deepcopy(whole)
    synchronised(shared, torch.device("cpu"))
    run: nn.Module = torch.compile(shared, backend="eager") if compiled else shared
    wrapped = DistributedDataParallel(run, broadcast_buffers=False)
    for samples in (5, 2):
        images = torch.rand(samples, 3, 4, 5, dtype=torch.float64)
        images = images.contiguous(memory_format=memory_format)
        labels = torch.arange(samples) % 3
        whole.zero_grad()
        F.cross_entropy(whole(images), labels).backward()
        shared.zero_grad()
        mine = slice(rank(), None, world_size())
        loss = F.cross_entropy(wrapped(images[mine]), labels[mine], reduction="sum")
        (loss * (world_size() / samples)).backward()
        for (name, ours), theirs in zip(shared.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7, msg=name)
        for (name, ours), theirs in zip(shared.named_buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=name)
    assert unsynchronised(shared) == []
    try:
        shared.train()(images[: int(rank() == 0)])
    except ValueError as error:
        assert "more than 1 value per channel" in str(error)
    else:
        raise AssertionError("one value per channel was normalised")


class OwnSums(nn.BatchNorm2d):
    """A subclass that never asks torch's function to normalise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input - input.mean((0, 2, 3), keepdim=True)


def check_unsynchronised() -> None:
    """A BatchNorm that cannot be synchronised is named."""
    network = synchronised(nn.Sequential(nn.BatchNorm2d(3), OwnSums(3)), torch.device("cpu"))
    network.train()(torch.rand(2, 3, 4, 4))
    assert unsynchronised(network) == ["1"]


class Spare(nn.Module):
    """A network with a layer that nothing uses, and an auxiliary classifier when it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.spare, self.last, self.early = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> object:
        x = self.first(x).mean((2, 3))
        return {"early": self.early(x), "logits": self.last(x)} if self.training else self.last(x)


def check_unused(accelerator: object) -> None:
    """Parameters without a gradient are left alone, an auxiliary classifier learns; two epochs."""
    images = np.random.default_rng(1).integers(0, 256, (9, 16, 16), dtype=np.uint8)
    split = ArraySplit(images, np.arange(9, dtype=np.int64) % 2)
    size = Preprocessing.of("small", 16)
    config = PruneConfig(batch_size=8, optimizer="sgd", lr=0.1)
    evaluator = Evaluator(split, 2, size, accelerator, 0)
    torch.manual_seed(2)
    network = Spare()
    assert has_unused_parameters(network, 16)
    assert not has_unused_parameters(StudentNet(num_classes=2), 32)
    before = copy.deepcopy(network.state_dict())
    Trainer(split, evaluator, config, size, accelerator, 0).fit(network, RoundSpec(0, 2))
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(key.startswith("spare") for key in changed)
    assert {"first.0.weight", "last.weight", "early.weight"} <= changed


def check_averages() -> None:
    """Running statistics of separate BatchNorms become their mean."""
    network = StudentNet(num_classes=3)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.fill_(float(rank()))
    average_running_statistics(network)
    expected = sum(range(world_size())) / world_size()
    for buffer in network.buffers():
        if buffer.is_floating_point():
            assert torch.allclose(buffer, torch.tensor(expected))


def check_evaluation(accelerator: object) -> None:
    """Each image counts once, for sizes that do not divide, one image included."""
    network = StudentNet(num_classes=5).eval()
    for count in (1, 2, 5, 600):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        split = ArraySplit(images, np.arange(count, dtype=np.int64) % 5)
        evaluator = Evaluator(split, 5, Preprocessing.of("small", 32), accelerator, 0)
        result = evaluator(network)
        assert result.count == count
        assert result.confusion.sum(1).tolist() == np.bincount(split.labels, minlength=5).tolist()
        inputs = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))) / 255
        with torch.inference_mode():
            logits = network(inputs[:, None].expand(-1, 3, -1, -1))
        assert evaluator.predict(network)[0] == logits.argmax(1).tolist()
        expected = F.cross_entropy(logits, torch.from_numpy(split.labels))
        assert abs(result.loss - float(expected)) < 1e-5


def check_errors_travel() -> None:
    """An error of the main process is raised everywhere; a difference between ranks is found."""

    def fail() -> None:
        raise DataError("bad image")

    try:
        on_main(fail)
    except DataError as error:
        assert str(error) == "bad image"
        assert getattr(error, "reported", False) == (rank() > 0)
    else:
        raise AssertionError("no error")
    try:
        on_main(lambda: [lambda: "of a module"])  # as a network that a factory defines within
    except UsageError as error:
        assert "can be pickled" in str(error)
        assert error.reported == (rank() != 0)
    else:
        raise AssertionError
    if rank() == 0:  # its factory made it importable, in this process alone
        sys.modules["hidden"] = types.ModuleType("hidden")
        exec("class Net: pass", vars(sys.modules["hidden"]))
    try:
        on_main(lambda: sys.modules["hidden"].Net())
    except UsageError as error:
        assert rank() != 0
        assert "can import: No module named 'hidden'; name the folder" in str(error)
    else:
        assert rank() == 0
    assert on_main(lambda: "from main") == "from main"
    check_same("equal", "x")
    try:
        check_same(f"rank {min(rank(), 1)}", "the network")
    except GammaslimError as error:
        assert "the network differs between processes" in str(error)
    else:
        raise AssertionError("no error")


accelerator = start("cpu", "fp32")
for samples in (9, 8, 1):
    check_gradients(samples)
for memory_format in (torch.contiguous_format, torch.channels_last):
    for compiled in (False, True):
        check_kinds(memory_format, compiled)
check_unsynchronised()
check_averages()
check_evaluation(accelerator)
check_unused(accelerator)
check_errors_travel()
dist.barrier()
print("all checks passed")
exit_now(0)
