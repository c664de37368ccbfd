"""Run by torchrun in test_distillation: what a distilled and sparse step gives on several ranks."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from job.cli.process_exit import exit_now
from job.distributed.collectives import check_same, digest, start
from job.models.student import StudentNet
from job.processes import rank, world_size
from job.training.distillation import distillation
from job.training.gamma import gamma_layers, gamma_parameters
from job.training.sparsity import apply_penalty
from job.training.sync_batchnorm import synchronised


def check_steps(samples: int, kind: str) -> None:
    """Two steps in float64 on global batches of ``samples``: an empty share included."""
    torch.manual_seed(0)
    alone = StudentNet(base=4, num_classes=3).double()
    student = StudentNet(base=4, num_classes=3).double()
    teacher = distillation(student, 0.7, 3.0, accelerator)
    shared = synchronised(copy.deepcopy(alone), torch.device("cpu"))
    wrapped = DistributedDataParallel(shared, broadcast_buffers=False)
    names = gamma_layers(alone)
    for _ in range(2):
        images = torch.rand(samples, 3, 32, 32, dtype=torch.float64)
        labels = torch.arange(samples) % 3
        for network in (alone, shared):
            network.zero_grad()
        (teacher.loss(alone(images), images, labels) / samples).backward()
        mine = slice(rank(), None, world_size())
        loss = teacher.loss(wrapped(images[mine]), images[mine], labels[mine])
        (loss * (world_size() / samples)).backward()
        for (name, ours), theirs in zip(shared.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7, msg=name)
        for network in (alone, shared):
            torch.optim.SGD(network.parameters(), 0.1).step()
            apply_penalty(kind, gamma_parameters(network, names), 0.05)
    check_same(digest({k: v for k, v in shared.state_dict().items() if "weight" in k}), "γ")
    pairs = zip(gamma_parameters(shared, names), gamma_parameters(alone, names), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


accelerator = start("cpu", "fp32")
for samples in (9, 8, 1):
    check_steps(samples, "l1")
check_steps(5, "polarize")
dist.barrier()
print("all checks passed")
exit_now(0)
