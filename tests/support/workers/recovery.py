"""Run by torchrun in test_recovery: three processes, one of them without a batch."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist

from job.cli.process_exit import exit_now
from job.distributed.collectives import check_same, digest, start
from job.models.student import StudentNet
from job.processes import rank
from job.slimming.analysis import analyse
from job.slimming.planning.plan import keep_all, layers_of
from job.slimming.recovery.recovery import recover
from job.slimming.surgery.surgery import apply_plan

start("cpu", "fp32")
torch.manual_seed(0)
network = StudentNet(base=4, num_classes=3).double().eval()
images = torch.rand(80, 3, 32, 32, dtype=torch.float64)
graph = analyse(network, images)
keep = keep_all(graph)
keep[graph.groups[-1].channels[::2]] = False
narrow = apply_plan(network, layers_of(graph, keep))
single = copy.deepcopy(narrow)
mine = [(images[rank() :: 2], None)] if rank() < 2 else []
together = recover(network, narrow, graph, keep, lambda: mine, 3)
check_same(digest(narrow.state_dict()), "the recovered network")
dist.barrier()
dist.destroy_process_group()
alone = recover(network, single, graph, keep, lambda: [images], 3)
assert together.epoch == alone.epoch > 0, (together, alone)
torch.testing.assert_close(together.after, alone.after)
for name, tensor in narrow.state_dict().items():
    torch.testing.assert_close(tensor, single.state_dict()[name], msg=name)
print("all checks passed")
exit_now(0)
