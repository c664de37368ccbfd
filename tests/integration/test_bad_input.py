"""Bad input, in numbers: whatever is thrown at the commands, they end as documented.

Every case is a command line on generated input (tests/support/hostile), run in a fork of one
process; some are run in a process of their own too, which must end the same way.
GAMMASLIM_FUZZ_LOG=FILE keeps a line a case.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.commands import clean_environ, gammaslim
from support.hostile import idx, images, models, options, weights
from support.hostile.case import DOCUMENTED, Case, Originals
from support.programs import ROOT, End, Server

SECONDS, MEMORY = 60, 2 << 30  # on a slow machine; most take less than a second
GENERATORS = (
    images.damaged, images.places, idx.idx_files, images.large, weights.files,
    models.model_folders, models.runs, options.tomls, options.variables, options.command_lines,
    options.names,
)  # fmt: skip


Run = Callable[[list[str], dict[str, str], Path, Path], End]


@pytest.fixture(scope="module")
def in_a_fork() -> Iterator[Run]:
    """Run ``gammaslim ARGS`` on one thread, in a fork that is held to its limits."""
    server = Server()

    def run(args: list[str], env: dict[str, str], cwd: Path, logs: Path) -> End:
        env = {**clean_environ(), "OMP_NUM_THREADS": "1", **env}
        return server.run(["-m", "job", *args], env, cwd, logs, limit=SECONDS, guard=True)

    yield run
    server.close()


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals.make(tmp_path_factory.mktemp("originals"))


def cases(originals: Originals) -> Iterator[Case]:
    for number, generate in enumerate(GENERATORS):
        yield from generate(random.Random(number), originals)


def fingerprint(root: Path) -> dict[str, str]:
    """Name, kind, size, time and content of everything below ``root``; of big files the ends."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        text = f"{status.st_mode} {status.st_size} {status.st_mtime_ns}"
        if stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                text += hashlib.sha256(file.read(1 << 20)).hexdigest()
        found[os.fsdecode(os.fsencode(path.relative_to(root)))] = text
    return found


def complaints(case: Case, end: End, *, several: bool = False) -> list[str]:
    """What is wrong with how a command ended; ``several`` errors may be said at once."""
    found = []
    if end.code is None:
        return [f"still ran after {SECONDS} s"]
    if end.code not in case.codes or end.code not in DOCUMENTED:
        found.append(f"exit code {end.code}, expected one of {sorted(case.codes)}")
    if "Traceback" in end.out + end.err:
        found.append("a traceback")
    if end.memory > MEMORY:
        found.append(f"{end.memory / 2**30:.2f} GiB")
    if not all(c.isprintable() or c == "\n" for c in end.out + end.err):
        found.append("control characters")
    lines = [
        line
        for line in end.err.split("\n")
        if line and not line.startswith(("Warning: ", "input size: ", "libgomp: "))
    ]
    if lines and lines[0].startswith("Usage: ") and end.code == 2:
        lines = [line for line in lines[1:] if not line.startswith("Try 'gammaslim ")]
    errors = [line for line in lines if line.startswith("Error: ")]
    if end.code and ((len(lines) != 1 and not several) or errors != lines or not errors):
        found.append(f"{len(lines)} lines on stderr in place of one")
    if not end.code and lines:
        found.append("more than warnings on stderr")
    return found


def log(case: Case, end: End, found: list[str]) -> None:
    """A line on the case for who looks into it."""
    if place := os.environ.get("GAMMASLIM_FUZZ_LOG"):
        numbers = f"{end.seconds:.2f} s {end.memory >> 20} MiB"
        line = (case.kind, repr(case.name), end.code, numbers, found, repr(end.err[-300:]))
        with Path(place).open("a") as file:
            print(*line, file=file)


def play(case: Case, folder: Path, run: Run) -> tuple[End, list[str]]:
    """Build a case in ``folder``, run it, check the files that remain, and remove the folder.

    Its caches are in a scratch of its own, so that no case finds those of another.
    """
    inputs, cwd, out, logs, scratch = (folder / n for n in ("in", "cwd", "out", "logs", "scratch"))
    for place in (inputs, cwd, out, logs, scratch):
        place.mkdir(parents=True)
    args = [os.fsdecode(os.fsencode(str(a))).replace("$OUT", str(out)) for a in case.build(inputs)]
    before = fingerprint(inputs)
    end = run(args, {"TMPDIR": str(scratch), **case.env}, cwd, logs)
    found = complaints(case, end, several="--dry-run" in args)
    touched = fingerprint(inputs) != before and not case.resumes
    found += ["the input was touched"] * touched
    files = [*cwd.rglob("*"), *out.rglob("*"), *inputs.rglob("*")]
    found += [f"{p.name} was left" for p in files if p.name.endswith(".tmp")]
    if end.code and end.code != 75:
        found += [f"{p} was left" for p in (*cwd.iterdir(), *out.iterdir()) if not p.is_dir()]
    found += [f"{p} was executed" for p in files if p.name in ("executed", "escaped")]
    shutil.rmtree(folder)
    return end, found


def test_bad_input_in_numbers(
    in_a_fork: Run, originals: Originals, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Of more than a thousand cases every 24th, or with --all every one."""
    share = 1 if request.config.getoption("--all") else 24
    before = fingerprint(originals.flat.parent)
    problems, codes, kinds = [], Counter[int | None](), Counter[str]()
    for number, case in enumerate(cases(originals)):
        if number % share:
            continue
        end, found = play(case, tmp_path / str(number), in_a_fork)
        codes[end.code] += 1
        kinds[case.kind] += 1
        if found:
            problems.append(f"{case.kind}: {case.name}: {'; '.join(found)}\n{end.err[-400:]}")
        log(case, end, found)
    print(dict(codes), dict(kinds))
    assert not problems, f"{len(problems)} of {codes.total()} cases:\n" + "\n".join(problems)
    assert fingerprint(originals.flat.parent) == before
    assert codes.total() >= 500 // share
    assert codes.total() - codes[0] >= 400 // share


CLOCK = re.compile(r" *[\d.]+ (ms|s|seconds?)\b| *[\d.]+x\b|about [\w ]+ left")


def in_a_process(args: list[str], env: dict[str, str], cwd: Path, logs: Path) -> End:
    """Run ``python -m job ARGS``."""
    done = gammaslim(*args, env={**env, "PYTHONPATH": str(ROOT)}, cwd=cwd)
    return End(done.code, done.out, done.err, 0, 0)


def test_the_fork_server_is_faithful(in_a_fork: Run, originals: Originals, tmp_path: Path) -> None:
    """A case of every fourth generator ends with the same words in a process of its own."""
    for number, generate in list(enumerate(GENERATORS))[::4]:
        case = list(generate(random.Random(number), originals))[3 + 2 * number]
        forked, _ = play(case, tmp_path / "case", in_a_fork)
        separate, found = play(case, tmp_path / "case", in_a_process)
        assert not found, (case, found, separate)
        ends = [(end.code, CLOCK.sub("", end.out), end.err) for end in (separate, forked)]
        assert ends[0] == ends[1]
