"""What a command does before it imports torch: help, and variables for threads."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from job.cli.main import gammaslim
from job.distributed.cores import PATIENCE, available_cores
from support.commands import run


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.alone
@pytest.mark.parametrize("command", [[], *([name] for name in sorted(gammaslim.commands))])
def test_help_answers_within_half_a_second(command: list[str]) -> None:
    """Of processor time: a busy machine has less of it."""
    before = os.times()
    done = run(sys.executable, "-m", "job", *command, "--help", fork=False)
    after = os.times()
    assert done.code == 0, done
    assert "Usage: gammaslim" in done.out
    assert sum(after[2:4]) - sum(before[2:4]) < 0.5


# stands in for torch's import in what the command starts: what the variables are at that moment
WATCH = """
import json, os, sys
from importlib.abc import MetaPathFinder
class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch" and "launch" not in sys.argv[1:2]:
            known = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
            found = {name: os.environ[name] for name in known if name in os.environ}
            os.write(1, (json.dumps(found) + "\\n").encode())
            os._exit(0)
sys.meta_path.insert(0, Finder())
"""


VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SCRIPT = Path(sys.executable).with_name("gammaslim")
MODULE = (sys.executable, "-m", "job")
SHARED = {"OMP_NUM_THREADS": str(max(1, available_cores() // 2)), **PATIENCE}
ALL = {"OMP_NUM_THREADS": str(available_cores()), **PATIENCE}


@pytest.mark.parametrize(
    ("command", "given", "expected"),
    [
        ((SCRIPT, "prune"), {}, [ALL]),
        ((*MODULE, "prune"), {}, [ALL]),
        ((*MODULE, "prune"), {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "1"}, []),
        ((*MODULE, "evaluate", "x", "--data", "x"), {"GOMP_SPINCOUNT": "5"}, []),
        ((*MODULE, "inspect", "x"), {}, [ALL]),
        ((*MODULE, "prune"), {"RANK": "1", "LOCAL_WORLD_SIZE": "2"}, [SHARED]),
        ((*MODULE, "launch", "--nproc", "1", "--", "prune"), {}, [ALL]),
        ((*MODULE, "launch", "--nproc", "2", "--", "prune"), {}, [SHARED, SHARED]),
    ],
)
def test_variables_are_set_before_torch_is_imported(
    command: tuple[object, ...],
    given: dict[str, str],
    expected: list[dict[str, str]],
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    done = run(*command, env={"PYTHONPATH": str(tmp_path), **given}, cwd=tmp_path)
    assert done.code == 0, done
    found = [json.loads(line) for line in done.out.splitlines()]
    if not expected:
        threads = {"OMP_NUM_THREADS": str(available_cores())}
        expected = [threads | given]
    assert found == expected, done


WITHOUT_DRIVER = """
import ctypes, sys
from pathlib import Path
from job.distributed import launch
from job.distributed.topology import Nodes

def load(name, *more, **options):
    if name != "libcuda.so.1":
        return library(name, *more, **options)
    if not driver:
        raise OSError(name)

driver, library = len(sys.argv) > 1, ctypes.CDLL
ctypes.CDLL, Path.exists = load, lambda _: False
launch.become = lambda _: sys.exit("torch" in sys.modules)
launch.launch(["prune"], None, Nodes())
"""


def test_launch_imports_torch_only_where_there_may_be_a_gpu() -> None:
    """Its import takes seconds, and the process that trains imports it again."""
    without, some = (run(sys.executable, "-c", WITHOUT_DRIVER, *arg) for arg in ((), ("driver",)))
    assert (without.code, without.err, some.code, some.err) == (0, "", 1, "")
