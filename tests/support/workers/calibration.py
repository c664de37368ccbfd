"""Run by torchrun: three processes, one of them without a batch where there are two images."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.distributed as dist

from job.cli.process_exit import exit_now
from job.distributed.collectives import start
from job.models.student import StudentNet
from job.processes import rank
from job.slimming.analysis import analyse
from job.slimming.calibration.input_statistics import CalibrationData, measure_inputs
from job.slimming.calibration.moments import Moments, RowMoments
from job.slimming.compensation.constants import add_biases, layers_without_constant
from job.slimming.compensation.cut_pair import CutPair
from job.slimming.compensation.methods import compensate_cut
from job.slimming.compensation.recalibration import recalibrate_batchnorms
from job.slimming.importance.refit import refit_importance
from job.slimming.importance.taylor import taylor_importance
from job.slimming.planning.plan import keep_all, layers_of
from job.slimming.planning.ranked_groups import rank_groups
from job.slimming.sensitivity.measure import measure_curves
from job.slimming.surgery.surgery import apply_plan

start("cpu", "fp32")
torch.manual_seed(0)
network = StudentNet(base=4, num_classes=3).double().eval()
images = torch.rand(12, 3, 32, 32, dtype=torch.float64)
labels = torch.arange(12) % 3
turns = [(images[part::3], labels[part::3]) for part in range(3)]
mine = turns[rank() : rank() + 1]
both = [(images[part], labels[part]) for part in (slice(0, 5), slice(5, 12))]
few = [(images[:2], labels[:2])]
mine_of_few = [(images[rank() : rank() + 1], labels[rank() : rank() + 1])] if rank() < 2 else []
recalibrate_batchnorms(network, both)  # else the outputs hardly depend on the images
graph = analyse(network, images)
together, of_few = (measure_inputs(network, graph, batches) for batches in (mine, mine_of_few))
taylor = taylor_importance(network, graph, mine)
keep = keep_all(graph)
keep[graph.groups[-1].channels[::2]] = False
layers = add_biases(layers_of(graph, keep), layers_without_constant(network, graph))
narrow = apply_plan(network, layers)
pair = CutPair(network, narrow, graph, keep, layers, images)
compensate_cut("regress", pair, CalibrationData(lambda: mine, together))
tuned = copy.deepcopy(narrow)
recalibrate_batchnorms(tuned, mine)
shared_scores = refit_importance(network, graph, together)
groups = rank_groups(graph, shared_scores)
sources = network, graph, groups
curves = measure_curves(*sources, CalibrationData(lambda: mine, together, 12), images)
of_two = measure_curves(*sources, CalibrationData(lambda: mine_of_few, of_few, 2), images)
dist.barrier()
dist.destroy_process_group()
# each process computes a share of the groups, and all get the same bytes
assert np.array_equal(shared_scores, refit_importance(network, graph, together), equal_nan=True)
single, alone_of_few = (measure_inputs(network, graph, batches) for batches in (both, few))
for of_one, of_three in ((single, together), (alone_of_few, of_few)):
    assert of_one.keys() == of_three.keys()
    for name, measured in of_one.items():
        assert measured.held_out.count == of_three[name].held_out.count
        assert (measured.held_out.count > 0) == (of_one is single)
        for part in ("count", "mean", "scatter"):
            ours, theirs = (getattr(m.overall(), part) for m in (measured, of_three[name]))
            torch.testing.assert_close(ours, theirs)
assert any(isinstance(measured.fitted, RowMoments) for measured in of_few.values())
assert any(isinstance(measured.fitted, Moments) for measured in of_few.values())
expected = torch.from_numpy(taylor_importance(network, graph, turns))
torch.testing.assert_close(torch.from_numpy(taylor), expected, equal_nan=True)
alone = measure_curves(*sources, CalibrationData(lambda: both, single, 12), images)
alone_of_two = measure_curves(*sources, CalibrationData(lambda: few, alone_of_few, 2), images)
for of_three, of_one, count in ((curves, alone, 3), (of_two, alone_of_two, 2)):
    assert of_three.keys() == of_one.keys() == {group.name for group in graph.groups}
    for name, curve in of_three.items():
        assert (curve.counts, curve.images) == (of_one[name].counts, count)
        torch.testing.assert_close(
            torch.tensor(curve.losses), torch.tensor(of_one[name].losses), rtol=1e-6, atol=1e-12
        )
highest = max(max(curve.losses) for curve in curves.values())
assert highest > 1e-4, highest
other, again = apply_plan(network, layers), copy.deepcopy(narrow)
pair = CutPair(network, other, graph, keep, layers, images)
compensate_cut("regress", pair, CalibrationData(lambda: both, single))
recalibrate_batchnorms(again, turns)
for ours, theirs in ((narrow, other), (tuned, again)):
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], msg=name)
print("all checks passed")
exit_now(0)
