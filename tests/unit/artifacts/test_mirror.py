"""A run in an object store: whatever ends the job, and whenever, another one can resume it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner

from job.artifacts.mirror import Mirror
from job.artifacts.object_store import Store, is_store_url
from job.artifacts.saving import load
from job.artifacts.store_lock import StoreLock
from job.artifacts.stored_data import local_data
from job.artifacts.stored_output import stored_output
from job.cli.main import gammaslim
from job.config import PruneConfig
from job.errors import InputNotFound, OutputError, StorageError, UsageError
from support.commands import ROOT

URL = "memory://bucket/runs/a"


@pytest.fixture(autouse=True)
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").store.clear()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    monkeypatch.setattr("os.fsync", lambda _: None)  # power failures are not tested here


@dataclass
class Job:
    """A run directory that a job fills, a step at a time, as `job.artifacts.run_directory` does."""

    run: Path
    lines: int = 0
    checkpoints: list[str] = field(default_factory=list)

    def write(self, name: str, content: str) -> None:
        path = self.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.1.tmp")
        temporary.write_text(content)
        temporary.replace(path)

    def log(self) -> None:
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(f"{self.lines:09d}\n")
        self.lines += 1

    def save(self, round_index: int, epoch: int) -> None:
        name = f"checkpoints/{round_index:03d}-{epoch:04d}-0000000"
        self.write(f"{name}/state.safetensors", f"{name} {self.lines}")
        self.write(f"{name}/manifest.json", json.dumps({"metrics": 10 * self.lines}))
        self.checkpoints.append(name)
        for old in self.checkpoints[:-2]:
            shutil.rmtree(self.run / old, ignore_errors=True)

    def keep_round(self, round_index: int) -> None:
        self.write(f"rounds/{round_index:02d}/model.safetensors", "w")
        self.write(f"rounds/{round_index:02d}/model.json", "{}")

    def steps(self, rounds: int = 2) -> list[object]:
        """Everything that a run does, as calls."""
        calls: list[object] = [lambda: self.write("config.toml", "[prune]")]
        for index in range(rounds):
            for epoch in (1, 2):
                calls += [self.log, lambda i=index, e=epoch: self.save(i, e)]
            calls += [lambda i=index: self.keep_round(i), self.log]
        return calls


class LimitedStore(Store):
    """A store that takes ``left`` more changes, then none: the job is dead."""

    left = 10**9

    def _count(self) -> None:
        if self.left <= 0:
            raise StorageError("unplugged")
        self.left -= 1

    def put(self, path: Path, name: str) -> None:
        self._count()
        super().put(path, name)

    def write(self, name: str, content: bytes) -> None:
        self._count()
        super().write(name, content)

    def delete(self, names: object) -> None:
        for name in names:  # type: ignore[attr-defined]
            self._count()
            super().delete([name])


def assert_resumable(run: Path) -> tuple[int, str]:
    """Check what `open_run` and `newest_position` rely on; return how far the run is."""
    if not run.is_dir():
        return 0, ""
    assert (run / "config.toml").is_file()
    rounds = sorted(path.name for path in (run / "rounds").glob("*"))
    assert rounds == [f"{n:02d}" for n in range(len(rounds))]
    for path in (run / "rounds").glob("*"):
        assert {p.name for p in path.iterdir()} == {"model.safetensors", "model.json"}
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("*"))
    for name in checkpoints:
        folder = run / "checkpoints" / name
        assert (folder / "state.safetensors").is_file()
        needed = json.loads((folder / "manifest.json").read_text())["metrics"]
        assert (run / "metrics.jsonl").stat().st_size >= needed
        assert int(name[:3]) <= len(rounds)  # the rounds before it are complete
    return len(rounds), checkpoints[-1] if checkpoints else ""


@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_job_that_dies_at_any_change_leaves_a_run_that_goes_on(
    tmp_path: Path, every: int
) -> None:
    reached: tuple[int, str] = (0, "")
    for left in range(0, 70, min(every, 3)):
        fsspec.filesystem("memory").store.clear()
        here = tmp_path / f"{every}-{left}"
        store = LimitedStore(URL)
        job, mirror = Job(here / "a" / "run"), Mirror(store, here / "a" / "run")
        store.left = left
        try:
            for number, step in enumerate(job.steps()):
                step()  # type: ignore[operator]
                if number % every == 0:
                    mirror.upload()
            mirror.upload()
        except StorageError:
            pass
        other = Mirror(Store(URL), here / "b" / "run")
        other.fetch()
        now = assert_resumable(here / "b" / "run")
        assert now >= reached  # nothing that was stored is lost
        reached = now
    assert reached == (2, "001-0002-0000000")


def test_the_store_follows_and_has_nothing_more(tmp_path: Path) -> None:
    run = tmp_path / "x" / "run"
    job, mirror, store = Job(run), Mirror(Store(URL), run), Store(URL)
    for step in job.steps():
        step()  # type: ignore[operator]
        mirror.upload()
    (run / "cache").mkdir()
    for name in ("STOP", "lock.json", ".reserve", "cache/x", ".report.html.77.tmp"):
        (run / name).touch()
    (run / "lock.json").unlink()
    mirror.upload()
    here = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    left_out = {"STOP", ".reserve", "cache/x", ".report.html.77.tmp"}
    assert set(store.list()) == here - left_out


def test_only_what_changed_is_uploaded_again(tmp_path: Path) -> None:
    run = tmp_path / "x" / "run"
    job, store = Job(run), LimitedStore(URL)
    mirror = Mirror(store, run)
    for step in job.steps():
        step()  # type: ignore[operator]
    mirror.upload()
    store.left = 0
    mirror.upload()  # nothing to do
    again = Mirror(store, run)  # the same machine, after a kill
    store.left = 1  # an old request to stop would be deleted
    again.fetch()
    again.upload()
    job.write("status.json", "{}")
    store.left = 2
    again.upload()  # the name of the attempt, and the file
    with pytest.raises(StorageError, match="unplugged"):
        store.delete(["status.json"])


def test_files_that_the_store_lacks_are_kept_on_the_machine(tmp_path: Path) -> None:
    run = tmp_path / "x" / "run"
    job, store = Job(run), LimitedStore(URL)
    steps = job.steps()
    mirror = Mirror(store, run)
    for step in steps[:7]:
        step()  # type: ignore[operator]
        mirror.upload()
    for step in steps[7:]:
        step()  # type: ignore[operator]
    again = Mirror(Store(URL), run)
    again.fetch()
    assert len(list((run / "rounds").iterdir())) == 2
    again.upload()
    assert "rounds/01/model.json" in Store(URL).list()


def test_a_run_that_another_machine_continued_is_fetched_and_the_old_one_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "x" / "run", tmp_path / "y" / "run"
    job = Job(first)
    mirror = Mirror(Store(URL), first)
    job.write("config.toml", "1")
    mirror.upload()
    job.write("summary.json", "only here")
    other = Mirror(Store(URL), second)
    other.fetch()
    Job(second).write("rounds/00/model.json", "{}")
    other.upload()
    Mirror(Store(URL), first).fetch()
    assert (first / "rounds" / "00" / "model.json").is_file()
    assert not (first / "summary.json").exists()
    aside = next(path for path in first.parent.iterdir() if path.name.startswith("run."))
    assert (aside / "summary.json").read_text() == "only here"
    assert "1 file that the store lacks" in capsys.readouterr().err


def test_a_checkpoint_written_again_is_incomplete_until_it_is_stored(tmp_path: Path) -> None:
    run = tmp_path / "x" / "run"
    job, store = Job(run), LimitedStore(URL)
    mirror = Mirror(store, run)
    job.write("config.toml", "1")
    job.save(0, 1)
    mirror.upload()
    job.lines = 5
    job.save(0, 1)
    store.left = 2  # the marker is deleted, the state replaced
    with pytest.raises(StorageError):
        mirror.upload()
    Mirror(Store(URL), tmp_path / "y" / "run").fetch()
    assert not (tmp_path / "y" / "run" / "checkpoints").exists()


# --- the lock


def lock_of(pid: int, identity: str) -> str:
    return json.dumps({
        "id": identity, "host": socket.gethostname(), "boot": "b", "processes": "p", "pid": pid,
        "started": "1",
    })  # fmt: skip


def test_a_live_job_elsewhere_is_seen_and_keeps_the_run(tmp_path: Path) -> None:
    store = Store(URL)
    here, there = tmp_path / "x", tmp_path / "y"
    for folder in (here, there):
        folder.mkdir()
    (there / "lock.json").write_text(lock_of(os.getpid(), "1"))
    holder, starter = StoreLock(store, there), StoreLock(store, here)
    holder.exchange()
    starter.fetch(wrote_last=False)
    assert json.loads((here / "lock.json").read_text())["id"] == "1"
    first = (here / "lock.json").stat().st_mtime_ns
    starter.exchange()
    assert (here / "lock.json").stat().st_mtime_ns == first  # no heartbeat yet
    holder.exchange()
    starter.exchange()
    assert (here / "lock.json").stat().st_mtime_ns > first
    assert not starter.may_write()
    assert not starter.lost
    assert holder.may_write()


def test_a_job_that_lost_its_run_learns_it_and_uploads_no_more(tmp_path: Path) -> None:
    store = Store(URL)
    here, there = tmp_path / "x" / "run", tmp_path / "y" / "run"
    for folder, identity in ((here, "1"), (there, "2")):
        folder.mkdir(parents=True)
        (folder / "lock.json").write_text(lock_of(os.getpid(), identity))
        (folder / "config.toml").write_text(identity)
    old, new = Mirror(store, here), Mirror(Store(URL), there)
    old.upload()
    old.lock.exchange()
    new.lock._last = store.read("lock.json")  # it waited, and took over
    new.lock.exchange()
    new.upload()
    old.lock.exchange()
    assert old.lock.lost
    assert (
        json.loads((here / "lock.json").read_text())["id"] == "2"
    )  # what job.artifacts.lock reads
    (here / "config.toml").write_text("of the old one")
    old.upload()
    assert store.read("config.toml") == b"2"
    old.lock.finish(release=True)
    assert store.read("lock.json") is not None


def test_a_stop_file_in_the_store_asks_the_job_to_stop(tmp_path: Path) -> None:
    store = Store(URL)
    store.write("STOP", b"")
    lock = StoreLock(store, tmp_path)
    lock.fetch(wrote_last=True)
    assert store.read("STOP") is None  # of an earlier attempt
    store.write("STOP", b"")
    lock.exchange()
    assert (tmp_path / "STOP").is_file()
    assert store.read("STOP") is None


# --- the option


def write_run(config: PruneConfig, content: str) -> Path:
    assert config.output
    run = Path(config.output)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(content)
    return run


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_the_output_is_stored_when_the_block_ends(
    tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = URL if scheme == "memory" else f"file://{tmp_path}/bucket/runs/a"
    with stored_output(PruneConfig(output=url)) as config:
        run = write_run(config, "x")
    assert run.name == "a"
    assert Store(url).read("config.toml") == b"x"
    assert f"stored in {url}" in capsys.readouterr().out
    shutil.rmtree(run)
    with stored_output(PruneConfig(output=url)) as config:
        assert (Path(str(config.output)) / "config.toml").read_text() == "x"
    with stored_output(PruneConfig(output=url, dry_run=True)) as config:
        write_run(config, "dry")
    assert Store(url).read("config.toml") == b"x"


def test_a_failed_run_is_stored_too(tmp_path: Path) -> None:
    with suppress(ZeroDivisionError), stored_output(PruneConfig(output=URL)) as config:
        raise ZeroDivisionError(write_run(config, "x"))
    assert Store(URL).read("config.toml") == b"x"


def test_a_store_that_fails_at_the_end_is_an_error_that_names_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("job.artifacts.stored_output.STORE_PATIENCE", 0.5)
    monkeypatch.setattr("job.artifacts.mirror.PERIOD", 0.05)

    def fail(*_: object) -> None:
        raise PermissionError("the token of key-id secret has expired")

    with pytest.raises(StorageError, match="lacks 2 files of this run"):  # noqa: PT012, SIM117
        with stored_output(PruneConfig(output=URL)) as config:
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            monkeypatch.setattr(fsspec.filesystem("memory").__class__, "put_file", fail)
            (write_run(config, "x") / "status.json").touch()
    err = capsys.readouterr().err
    assert "the token of key-id … has expired" in err
    assert "secret" not in err.replace("…", "")
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with stored_output(PruneConfig(output=URL)):
        pass
    assert set(Store(URL).list()) == {".attempt", "config.toml", "status.json"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:secret@bucket/a", "must not contain keys"),
        ("s3://bucket/a?token=secret", "must not contain keys"),
        ("s3://bucket", r"names no folder: give e\.g\. s3://BUCKET/runs/NAME"),
        ("nowhere://bucket/a", "nowhere:// is not known"),
    ],
)
def test_urls_that_cannot_be_used(url: str, message: str) -> None:
    assert is_store_url(url)
    with pytest.raises(UsageError, match=message) as error:
        Store(url).list()
    assert "secret" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UsageError, match=r"pip install 'gammaslim\[s3\]'"):
        Store("s3://bucket/a").list()
    with pytest.raises(UsageError, match=r"pip install 'gammaslim\[cloud\]'"):
        Store("gs://bucket/a").list()


def test_two_jobs_on_one_machine_do_not_share_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.artifacts.stored_output.GUARD", 0.2)
    with stored_output(PruneConfig(output=URL)):
        if child := os.fork():
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 73
        else:
            code = 1
            try:
                with stored_output(PruneConfig(output=URL)):
                    code = 0
            except OutputError as error:
                code = error.exit_code
            finally:
                os._exit(code)


# --- commands that read


def store_run(url: str, run: Path) -> None:
    for path in run.rglob("*"):
        if path.is_file():
            Store(url).put(path, path.relative_to(run).as_posix())


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_commands_read_a_run_in_a_store(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = "memory://bucket" if scheme == "memory" else f"file://{tmp_path}/bucket"
    url = f"{base}/runs/a"
    store_run(url, ROOT / "tests" / "support" / "old_runs" / "finished")
    status = json.loads(invoke("status", url, "--json"))["runs"][0]
    assert (status["path"], status["run"], status["state"]) == (url, "a", "finished")
    assert status["next"][0] == f"gammaslim report {url}"
    assert "accuracy" in invoke("report", url)
    page = (tmp_path / "report.html").read_text()
    assert f"gammaslim.load(&#39;{url}/rounds/" in page
    assert "/gammaslim-" not in page
    assert sum(p.numel() for p in load(url).parameters()) == 5337
    assert "5,337 params" in invoke("inspect", url)
    assert "5,337 params" in invoke("inspect", f"{url}/rounds/01")
    weights = f"{url}/rounds/00/model.safetensors"
    assert "10 classes" in invoke("inspect", weights, "--model", "student", "--model-arg", "base=2")
    store_run(f"{base}/runs/b", ROOT / "tests" / "support" / "old_runs" / "stopped")
    runs = json.loads(invoke("status", f"{base}/runs", "--json"))["runs"]
    assert [run["path"] for run in runs] == [f"{base}/runs/a", f"{base}/runs/b"]
    assert runs[1]["next"][0].endswith(f"--output {base}/runs/b")
    assert invoke("status", f"{base}/runs/none", code=66).endswith("holds no files\n")


def test_a_dead_job_of_another_machine_is_seen_in_the_store(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "support" / "old_runs" / "stopped", run)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "running"}))
    store_run(URL, run)
    lock = {**json.loads(lock_of(7, "1")), "host": "far-away"}
    for age, state in ((1, "running"), (100, "died")):
        beat = int((time.time() - age) * 1e9)
        Store(URL).write("lock.json", json.dumps(lock | {"beat": beat}).encode())
        found = json.loads(invoke("status", URL, "--json"))["runs"][0]
        assert (found["state"], found["host"]) == (state, "far-away")


def invoke(*args: str, code: int = 0) -> str:
    done = CliRunner().invoke(gammaslim, list(args))
    assert done.exit_code == code, done.output
    return done.output


# --- data


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_data_in_a_store_are_copied_once(
    tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "memory://bucket" if scheme == "memory" else f"file://{tmp_path}/bucket"
    store = Store(f"{base}/photos")
    for name in ("train/cat/0 a.png", "train/dog/ü.png", "val/cat/1.png"):
        store.write(name, name.encode())
    copy = Path(str(local_data(f"{base}/photos")))
    files = {path.relative_to(copy).as_posix(): path.read_text() for path in copy.rglob("*.png")}
    assert files == {name: name for name in store.list()}
    assert copy.name == "photos"
    assert "copying 3 files" in capsys.readouterr().out
    assert local_data(f"{base}/photos/") == str(copy)
    assert capsys.readouterr().out == ""
    store.write("val/dog/2.png", b"2")
    assert local_data(f"{base}/photos") != str(copy)
    archive = Path(str(local_data(f"{base}/photos/train/dog/ü.png")))
    assert (archive.name, archive.read_text()) == ("ü.png", "train/dog/ü.png")
    with pytest.raises(InputNotFound, match="holds no files"):
        local_data(f"{base}/none")
    assert local_data("photos") == "photos"
    assert local_data(None) is None


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (type("HttpError", (Exception,), {"code": 401})("Anonymous caller, 401"), OutputError),
        (OSError("Forbidden: b/bucket/o"), OutputError),
        (type("RefreshError", (Exception,), {})("invalid_grant"), OutputError),
        (type("HttpError", (Exception,), {"code": 503})("busy, 503"), StorageError),
        (ConnectionRefusedError("no answer"), StorageError),
    ],
)
def test_what_google_cloud_storage_refuses_is_no_outage(
    error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Files:
        def cat_file(self, path: str) -> bytes:
            raise error

    store = Store("gs://bucket/runs/a")
    monkeypatch.setattr(store, "_connect", lambda: (Files(), "bucket/runs/a"))
    with pytest.raises(raised):
        store.read("config.toml")
