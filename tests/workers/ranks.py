"""Run by torchrun in test_processes: what only shows between ranks."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from job.data import Preprocessing
from job.data.dataset import ArraySplit
from job.errors import DataError, GammaslimError
from job.models.student import StudentNet
from job.processes import check_same, on_main, rank, start, world
from job.training.evaluation import Evaluator
from job.training.sync_batchnorm import average_running_statistics, synchronised


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
    mine = slice(rank(), None, world())
    loss = F.cross_entropy(wrapped(images[mine]), labels[mine], reduction="sum")
    (loss * (world() / samples)).backward()
    for (name, ours), theirs in zip(shared.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7, msg=name)
    for ours, theirs in zip(shared.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def check_averages() -> None:
    """Running statistics of separate BatchNorms become their mean."""
    network = StudentNet(num_classes=3)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.fill_(float(rank()))
    average_running_statistics(network)
    expected = sum(range(world())) / world()
    for buffer in network.buffers():
        if buffer.is_floating_point():
            assert torch.allclose(buffer, torch.tensor(expected))


def check_evaluation(accelerator: object) -> None:
    """Each picture counts once, for sizes that do not divide, one picture included."""
    network = StudentNet(num_classes=5).eval()
    for count in (1, 2, 5, 600):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        split = ArraySplit(images, np.arange(count, dtype=np.int64) % 5)
        evaluator = Evaluator(split, 5, Preprocessing("small", 32), accelerator, 0)
        result = evaluator(network)
        assert result.count == count
        assert result.confusion.sum(1).tolist() == np.bincount(split.labels, minlength=5).tolist()
        inputs = torch.from_numpy(np.pad(images, ((0, 0), (2, 2), (2, 2)))) / 255
        with torch.inference_mode():
            logits = network(inputs[:, None].expand(-1, 3, -1, -1))
        assert evaluator.predict(network) == logits.argmax(1).tolist()
        expected = F.cross_entropy(logits, torch.from_numpy(split.labels))
        assert abs(result.loss - float(expected)) < 1e-5


def check_errors_travel() -> None:
    """An error of the main process is raised everywhere; a difference between ranks is found."""

    def fail() -> None:
        raise DataError("bad picture")

    try:
        on_main(fail)
    except DataError as error:
        assert str(error) == "bad picture"
        assert getattr(error, "reported", False) == (rank() > 0)
    else:
        raise AssertionError("no error")
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
check_averages()
check_evaluation(accelerator)
check_errors_travel()
dist.barrier()
print("all checks passed", flush=True)
dist.destroy_process_group()
