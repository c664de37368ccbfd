"""StudentNet is the homework's, to the parameter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from job.errors import UsageError
from job.models.factory import build_network
from job.models.student import StudentNet
from job.slimming.planning.cost import layer_costs, network_cost
from support.reference import PlainStudentNet

WIDTHS = {
    1: 256_779,
    0.95: 236_066,
    0.9025: 217_850,
    0.8573749999999999: 200_354,
    0.8145062499999999: 185_091,
    0.7737809374999999: 171_606,
    0.9: 216_518,
    0.9**2: 183_578,
}


@pytest.mark.parametrize(("width", "params"), WIDTHS.items())
def test_parameters_at_each_width(width: float, params: int) -> None:
    network = StudentNet(width_mult=width)
    assert sum(p.numel() for p in network.parameters()) == params
    assert network_cost(network, 256).params == params


def test_state_dict_keys_shapes_and_outputs_are_the_homeworks() -> None:
    network, plain = StudentNet().eval(), PlainStudentNet().eval()
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert shapes == {key: value.shape for key, value in plain.state_dict().items()}
    assert len(shapes) == 72
    plain.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 64, 48)
    torch.testing.assert_close(network(images), plain(images))


@pytest.mark.parametrize(("width", "size", "macs"), [(1, 256, 118.4e6), (0.95, 256, 112.8e6)])
def test_costs_agree_with_torchs_counter_and_the_homework(
    width: float, size: int, macs: float
) -> None:
    network = StudentNet(width_mult=width).eval()
    cost = network_cost(network, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.rand(1, 3, size, size))
    assert counter.get_total_flops() == 2 * cost.macs
    assert cost.macs == pytest.approx(macs, rel=1e-3)
    assert sum(row.params for row in layer_costs(network, size)) == cost.params
    state = network.state_dict().values()
    assert cost.bytes == sum(t.numel() * t.element_size() for t in state)


def test_a_width_without_channels_and_unknown_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="without channels"):
        build_network("student", 11, {"width_mult": 0.007})
    with pytest.raises(UsageError, match="depth"):
        build_network("student", 11, {"depth": 3})
    with pytest.raises(UsageError, match="models: student"):
        build_network("studnet", 11, {})
