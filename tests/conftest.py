"""Options and fixtures of all tests."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.commands import gammaslim
from support.datasets import draw_image, write_flat
from support.programs import close_server

COVERING = (  # measure the coverage of job/: their tests run in its process
    "tests/unit/",
    "tests/integration/test_bench.py",
    "tests/integration/test_commands.py",
    "tests/integration/test_predictions.py",
    "tests/integration/test_slim_command.py",
    "tests/integration/test_tracking.py",
)
TOGETHER = (  # files with costly fixtures, in the order in which they start: long ones first
    "tests/system/test_containers.py",
    "tests/integration/test_job.py",
    "tests/integration/test_resume.py",
    "tests/system/test_slurm.py",
    "tests/system/",
    "tests/integration/test_readme.py",
    "tests/integration/test_task.py",
    "tests/integration/test_storage.py",
    "tests/integration/test_export_card.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all``: every case of what is else run by samples."""
    parser.addoption("--all", action="store_true", help="all cases of the tests marked sampled")
    parser.addoption(
        "--part",
        choices=("covering", "rest"),
        help="the first case of each test in COVERING, or all others",
    )


def pytest_collection_finish() -> None:
    """Keep what all tests import out of collections: a run asks for several, each took a second."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Try again what measures time; leave out cases of ``sampled(k)`` and other parts."""
    for item in items:
        if item.get_closest_marker("alone"):  # a machine may be slow for a while
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(key=_start)
    _sample(config, items)
    if part := config.getoption("--part"):
        first = set({item.nodeid.partition("[")[0]: item for item in reversed(items)}.values())
        covering = {item for item in first if item.nodeid.startswith(COVERING)}
        unwanted = [item for item in items if (item in covering) != (part == "covering")]
        _leave_out(config, items, unwanted)


def _start(item: pytest.Item) -> int:
    """Return the place of a test among those that start first."""
    return next(
        (n for n, file in enumerate(TOGETHER) if item.nodeid.startswith(file)), len(TOGETHER)
    )


def _sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of ``sampled(k)`` keep one of each k cases, in turn."""
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
    _leave_out(config, items, left_out)


def _leave_out(
    config: pytest.Config, items: list[pytest.Item], left_out: list[pytest.Item]
) -> None:
    excluded = set(left_out)
    items[:] = [item for item in items if item not in excluded]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file with costly fixtures in one process, which makes them once.

    The groups of xdist 3.8 (``xdist_group``) do not work with pytest 9.2.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.startswith(TOGETHER) else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _jobs_are_brief() -> None:
    from support.brief_jobs import make_jobs_brief  # with torch: not where tests are handed out

    make_jobs_brief()


@pytest.fixture(scope="session", autouse=True)
def _programs_end_with_the_tests() -> Iterator[None]:
    yield
    close_server()


@pytest.fixture(autouse=True)
def _forget_modules_of_the_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget what a test imported from its own folder: another one may use the name too."""
    before, folders = set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folders):
            del sys.modules[name]


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` that the first of the test processes makes, and the others wait for."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place = base / "made 42 é" / name
    place.parent.mkdir(exist_ok=True)
    with place.with_name(f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            made = place.with_name("made") / name
            make(made)
            made.rename(place)
    return place


@pytest.fixture(scope="session")
def flat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Food-11 data set in a path with digits, a space and a letter beyond ASCII."""
    return _made_once(tmp_path_factory, "food-11", _write_data)


def _write_data(root: Path) -> None:
    write_flat(root, {"training": 8, "validation": 5, "evaluation": 3})
    rng = np.random.default_rng(3)
    (root / "testing").mkdir()
    for number in (0, 1, 2, 10, 11):
        draw_image(rng, number % 3, 40, 40).save(root / "testing" / f"{number}.png")


@pytest.fixture(scope="session")
def finished_run(flat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds on ``flat_data``, with W&B offline; each test process has a copy."""

    def make(output: Path) -> None:
        done = gammaslim(
            "prune", "--data", flat_data, "--output", output, "--base-epochs", 2, "--rounds", 2,
            "--epochs", 2, "--batch-size", 10, "--workers", 1, fork=False,
        )  # fmt: skip
        assert done.code == 0, done

    made = _made_once(tmp_path_factory, "run é", make)
    return shutil.copytree(made, tmp_path_factory.mktemp("runs 1") / "run é", symlinks=True)
