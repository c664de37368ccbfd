"""Tables of layer times: measured at some widths, monotone, with the tiles of the hardware."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from job.slimming.latency.layer_shapes import LayerShape, narrow_call, shape_of
from job.slimming.latency.layer_table import LayerTable, measure_table, widths_of
from job.slimming.latency.table_cache import cache_file, read_tables, write_tables
from support.clocks import FakeClock

CONV = LayerShape("Conv2d", 128, 256, 1, (8, 8))


def seconds_of(channels: tuple[int, int], tiles: tuple[int, int]) -> float:
    whole = [math.ceil(n / tile) * tile for n, tile in zip(channels, tiles, strict=True)]
    return 1e-4 + 1e-8 * whole[0] * whole[1]


def tiled(clock: FakeClock, tiles: tuple[int, int]) -> Callable[[int, int], Callable[[], None]]:
    """Layers whose time is that of whole tiles of channels."""

    def call(inputs: int, outputs: int) -> Callable[[], None]:
        whole = [
            math.ceil(n / tile) * tile for n, tile in zip((inputs, outputs), tiles, strict=True)
        ]
        return clock.call(1e-4 + 1e-8 * whole[0] * whole[1])

    return call


@pytest.mark.parametrize("tiles", [(1, 1), (8, 16), (16, 64), (32, 32)])
def test_the_measurement_finds_the_tiles_of_the_hardware(tiles: tuple[int, int]) -> None:
    clock = FakeClock()
    table = measure_table(CONV, tiled(clock, tiles), clock)
    assert table.tiles == tiles
    for channels in ((128, 256), (96, 192), (64, 100), (50, 129), (33, 65)):
        assert table.at(*channels) == pytest.approx(seconds_of(channels, tiles))
    assert table.at(0, 256) == table.at(128, 0) == 0


def test_of_a_large_layer_one_is_built_at_a_time() -> None:
    clock, alive = FakeClock(), [0, 0]

    class Call:
        def __init__(self) -> None:
            alive[0] += 1
            alive[1] = max(alive)

        def __call__(self) -> None:
            clock.work(1e-4)

        def __del__(self) -> None:
            alive[0] -= 1

    measure_table(LayerShape("Linear", 4096, 4096, 1, ()), lambda _i, _o: Call(), clock)
    assert alive[1] <= 2
    measure_table(CONV, lambda _i, _o: Call(), clock)
    assert alive[1] > 20


def test_more_channels_never_take_less_time() -> None:
    clock, rng = FakeClock(), np.random.default_rng(0)
    noisy = measure_table(CONV, lambda i, o: clock.call(1e-8 * i * o * rng.uniform(0.5, 2)), clock)
    times = [[noisy.at(i, o) for o in range(1, 257, 5)] for i in range(1, 129, 5)]
    assert (np.diff(times, axis=0) >= 0).all()
    assert (np.diff(times, axis=1) >= 0).all()


def test_a_layer_with_as_many_outputs_as_inputs_has_one_column() -> None:
    clock = FakeClock()
    shape = LayerShape("BatchNorm2d", 64, 64, 1, (8, 8), channelwise=True)
    table = measure_table(shape, lambda i, o: clock.call(1e-6 * i), clock)
    assert table.seconds.shape == (5, 1)
    assert table.at(32, 32) == pytest.approx(table.at(64, 64) / 2)


def test_widths_are_multiples_of_eight_where_there_are_many_channels() -> None:
    assert widths_of(256) == (32, 64, 128, 192, 256)
    assert widths_of(100) == (16, 24, 48, 72, 100)
    assert widths_of(3) == (1, 2, 3)
    assert widths_of(1) == (1,)


def test_interrupted_calls_do_not_count() -> None:
    rng = np.random.default_rng(0)
    clock = FakeClock(lambda _now: 50.0 if rng.random() < 0.2 else 1.0)
    table = measure_table(CONV, tiled(clock, (1, 1)), clock)
    assert table.at(128, 256) == pytest.approx(1e-4 + 1e-8 * 128 * 256)


@pytest.mark.parametrize(
    ("layer", "size", "wide", "narrow"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9), (6, 8), (3, 5)),
        (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 9), (6, 6), (4, 4)),
        (nn.Conv1d(6, 8, 3), (2, 6, 9), (6, 8), (2, 2)),
        (nn.BatchNorm2d(6), (2, 6, 9, 9), (6, 6), (4, 4)),
        (nn.Linear(6, 4), (2, 6), (6, 4), (3, 4)),
        (nn.Linear(6, 4, bias=False), (2, 5, 6), (6, 4), (3, 2)),
    ],
)
def test_a_layer_of_any_width_can_be_timed(
    layer: nn.Module, size: tuple[int, ...], wide: tuple[int, int], narrow: tuple[int, int]
) -> None:
    shape = shape_of(layer, size)
    assert shape is not None
    assert (shape.inputs, shape.outputs) == wide
    state = torch.random.get_rng_state()
    outputs = narrow_call(layer, shape, *narrow)()
    assert isinstance(outputs, torch.Tensor)
    axis = outputs.dim() - 1 if isinstance(layer, nn.Linear) else 1
    assert outputs.shape[axis] == narrow[1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_other_layers_are_not_timed_alone() -> None:
    assert shape_of(nn.Conv2d(6, 8, 3, groups=2), (1, 6, 9, 9)) is None
    assert shape_of(nn.ReLU(), (1, 6)) is None
    one, other = (shape_of(nn.Conv2d(6, 8, k), (1, 6, 9, 9)) for k in (1, 3))
    assert one
    assert other
    assert one.key != other.key


def test_tables_are_found_again_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_file(torch.device("cpu"), torch.float32, "contiguous")
    assert path.is_relative_to(tmp_path)
    assert path != cache_file(torch.device("cpu"), torch.bfloat16, "contiguous")
    assert read_tables(path) == {}
    clock = FakeClock()
    table = measure_table(CONV, tiled(clock, (8, 16)), clock)
    assert write_tables(path, {"a": table})
    (found,) = read_tables(path).values()
    assert found.at(50, 129) == table.at(50, 129)
    negative = '{"a": {"inputs": [1], "outputs": [1], "seconds": [[-1]], "tiles": [1, 1]}}'
    for damage in ("", "{", "[]", '{"a": {"inputs": [1]}}', negative):
        path.write_text(damage)
        assert read_tables(path) == {}
    (tmp_path / "file").write_text("")
    assert not write_tables(tmp_path / "file" / "a.json", {"a": table})


def test_a_table_is_not_read_from_other_numbers() -> None:
    for values in ({}, {"inputs": [1, 2], "outputs": [1], "seconds": [[1.0]], "tiles": [1, 1]}):
        with pytest.raises((ValueError, KeyError)):
            LayerTable.from_dict(values)
