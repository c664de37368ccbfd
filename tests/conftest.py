"""What the tests share: a command runner, small data sets, networks with random weights."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from job.slimming.importance.criteria import gamma_importance
from job.slimming.planning.cost import picture as picture_like
from job.slimming.planning.plan import Plan
from job.slimming.planning.planner import Slimming, analyse, make_plan
from job.slimming.planning.target import Budget
from programs import close_server, forkable, run_forked

ROOT = Path(__file__).parent.parent


class Result:
    """How a command ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


# the homework's cut, which costs nothing: most tests are of something else than the default one
CHEAP = {"GAMMASLIM_PRUNE_IMPORTANCE": "gamma", "GAMMASLIM_PRUNE_COMPENSATE": "none"}


def clean_environ() -> dict[str, str]:
    """The caller's environment without W&B's and Gammaslim's variables, but for a cheap cut."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "GAMMASLIM_"))}
    return own | CHEAP


os.environ.update(CHEAP)  # for what tests start otherwise


def run(
    *command: object,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    fork: bool = True,
) -> Result:
    """Run a command without W&B's and Gammaslim's variables of the caller.

    Programs that import torch are run by ``fork`` where that makes no difference (programs.py).
    """
    parts, whole = [str(part) for part in command], {**clean_environ(), **(env or {})}
    if fork and forkable(parts, env or {}):
        return Result(run_forked(parts[1:], whole, cwd))
    done = subprocess.run(
        parts, env=whole, cwd=cwd, capture_output=True, text=True, timeout=900, check=False
    )
    return Result(done)


def gammaslim(
    *args: object,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    fork: bool = True,
) -> Result:
    """Run ``python -m job …``."""
    return run(sys.executable, "-m", "job", *args, env=env, cwd=cwd, fork=fork)


def picture(rng: np.random.Generator, label: int, width: int, height: int) -> Image.Image:
    """Noise with a bright bar whose place tells the class."""
    pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
    start = (label * width) // 4
    pixels[:, start : start + width // 4] += 150
    return Image.fromarray(pixels)


def write_flat(root: Path, counts: dict[str, int], classes: int = 3, size: int = 40) -> Path:
    """Food-11 files: ``counts`` pictures a class in each split, ``CLASS_NUMBER.png``."""
    rng = np.random.default_rng(7)
    for split, count in counts.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for label in range(classes):
            for number in range(count):
                picture(rng, label, size, size + label).save(root / split / f"{label}_{number}.png")
    return root


def write_idx(path: Path, values: np.ndarray) -> None:
    """An IDX file of unsigned bytes, gzipped when the name says so."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_noise_idx(root: Path, train: int, valid: int, classes: int = 4, side: int = 32) -> Path:
    """IDX files of noise pictures, without flat areas, whose mean tells the class."""
    rng = np.random.default_rng(11)
    root.mkdir(parents=True)
    for split, count in (("train", train), ("validation", valid)):
        labels = np.arange(count) % classes
        images = rng.integers(0, 128, (count, side, side)) + labels[:, None, None] * 30
        write_idx(root / f"{split}-images-idx3-ubyte", images)
        write_idx(root / f"{split}-labels-idx1-ubyte", labels)
    return root


def randomise(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights, γ > 0 and running statistics, as after some training; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                count = layer.num_features
                for tensor, scale, least in (
                    (layer.weight, torch.rand(count, generator=generator), 0.1),
                    (layer.bias, torch.randn(count, generator=generator) * 0.3, 0),
                    (layer.running_mean, torch.randn(count, generator=generator) * 0.2, 0),
                    (layer.running_var, torch.rand(count, generator=generator), 0.5),
                ):
                    if tensor is not None:
                        tensor.copy_(scale + least)
    return network.eval()


def uniform(network: torch.nn.Module, width: float, size: int = 64) -> Plan:
    """The homework's plan: the same fraction of each group of channels, by γ."""
    graph = analyse(network, picture_like(size))
    slimming = Slimming("uniform", Budget("width", width))
    return make_plan(network, graph, gamma_importance(network, graph), slimming)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all``: every case of what is else run by samples."""
    parser.addoption("--all", action="store_true", help="all cases of the tests marked sampled")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked ``sampled(k)`` one of each k cases runs, not always the same of the k."""
    if config.getoption("--all") or len({item.nodeid.partition("[")[0] for item in items}) < 2:
        return
    seen: Counter[str] = Counter()
    left_out = []
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark:
            name = item.nodeid.partition("[")[0]
            block, place = divmod(seen[name], mark.args[0])
            if place != block % mark.args[0]:
                left_out.append(item)
            seen[name] += 1
    items[:] = [item for item in items if item not in set(left_out)]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def _programs_end_with_the_tests() -> Iterator[None]:
    yield
    close_server()


@pytest.fixture(scope="session")
def flat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Food-11 data set in a path with digits, a space and a letter beyond ASCII."""
    root = tmp_path_factory.mktemp("data 42 é") / "food-11"
    write_flat(root, {"training": 8, "validation": 5, "evaluation": 3})
    rng = np.random.default_rng(3)
    (root / "testing").mkdir()
    for number in (0, 1, 2, 10, 11):
        picture(rng, number % 3, 40, 40).save(root / "testing" / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def finished_run(flat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds on ``flat_data``, with W&B offline."""
    output = tmp_path_factory.mktemp("runs 1") / "run é"
    done = gammaslim(
        "prune", "--data", flat_data, "--output", output, "--base-epochs", 2, "--rounds", 2,
        "--epochs", 2, "--batch-size", 10, "--workers", 1, fork=False,
    )  # fmt: skip
    assert done.code == 0, done
    return output
