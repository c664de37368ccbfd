"""Runs with a cache of decoded images give the weights of runs without one."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import HOMEWORK_CUT, Result, gammaslim
from support.datasets import write_flat, write_noise_idx

MODES = ("off", "auto", "ram", "disk")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flat(tmp_path_factory.mktemp("cached") / "data", {"training": 6, "validation": 2})


def prune(data: Path, output: Path, *more: object, scratch: str = "", launch: int = 0) -> Result:
    """A run of one base epoch and one round."""
    launcher = ("launch", "--nproc", launch, "--") if launch else ()
    short = ("--base-epochs", 1, "--rounds", 1, "--epochs", 1, "--image-size", 32)
    fixed = ("--transform", "homework", "--model-arg", "base=2", *HOMEWORK_CUT)
    quiet = ("--device", "cpu", "--wandb", "off")
    return gammaslim(
        *launcher, "prune", "--data", data, "--output", output, *short, *fixed, *quiet, *more,
        env={"TMPDIR": scratch, "SLURM_TMPDIR": ""},
    )  # fmt: skip


def weights(run: Path) -> list[bytes]:
    files = sorted(run.glob("rounds/*/model.safetensors"))
    assert len(files) == 2
    return [file.read_bytes() for file in files]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short name: multiprocessing's sockets in TMPDIR take 107 characters."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_weights_are_the_same_with_and_without_a_cache(
    tmp_path: Path, data: Path, scratch: Path
) -> None:
    for mode in MODES:
        done = prune(data, tmp_path / mode, "--cache", mode)
        assert done.code == 0, done
        where = {"off": "", "disk": "disk/cache/"}.get(mode, "in memory")
        assert where in done.out
        assert ("cache: " in done.out) == (mode != "off")
        assert weights(tmp_path / mode) == weights(tmp_path / "off")
    for name in ("first", "second"):
        done = prune(data, tmp_path / name, scratch=str(scratch))
        assert done.code == 0, done
        assert f"{scratch}/gammaslim-cache-{os.getuid()}" in done.out
        assert ("found" in done.out) == (name == "second")
        assert weights(tmp_path / name) == weights(tmp_path / "off")
    assert len(list(scratch.glob("*/*.images"))) == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_two_processes_build_and_share_it(tmp_path: Path, data: Path, mode: str) -> None:
    for name in ("off", mode):
        done = prune(data, tmp_path / name, "--cache", name, launch=2)
        assert done.code == 0, done
        assert done.out.count("built in") == (name == mode)
    assert weights(tmp_path / mode) == weights(tmp_path / "off")


def test_a_run_resumes_to_the_same_weights_with_another_cache(tmp_path: Path, data: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert prune(data, whole, "--cache", "off").code == 0
    assert prune(data, run, "--cache", "ram", "--rounds", 0).code == 0
    assert prune(data, run, "--cache", "disk", "--cache-dir", tmp_path / "place").code == 0
    assert weights(run) == weights(whole)
    assert (tmp_path / "place").is_dir()


def test_a_limit_of_the_sides_belongs_to_the_run_only_if_an_image_is_larger(
    tmp_path: Path, data: Path
) -> None:
    plain, run, small = tmp_path / "plain", tmp_path / "run", tmp_path / "small"
    assert prune(data, plain).code == 0
    done = prune(data, run, "--cache-max-side", 100)
    assert "reduced" not in done.out
    assert weights(run) == weights(plain)
    assert prune(data, run, "--rounds", 1).code == 0  # without the option: it changed nothing
    for name in ("small", "again"):
        options = ("--cache-max-side", 36, "--cache", "ram" if name == "small" else "off")
        done = prune(data, tmp_path / name, *options)
        assert "images reduced to 36 pixels" in done.out
        assert weights(tmp_path / name) == weights(small) != weights(plain)
    card = json.loads((small / "rounds" / "01" / "model.json").read_text())
    assert card["input"]["max_side"] == 36  # evaluate, predict and other tools see the same images
    refused = prune(data, small, "--rounds", 1)
    assert refused.code == 78, refused
    assert "was begun with --cache-max-side 36" in refused.err


def test_a_cache_that_does_not_fit_is_refused_or_left_out(tmp_path: Path, data: Path) -> None:
    full = Path("/dev/full")
    refused = prune(data, tmp_path / "run", "--cache", "disk", "--cache-dir", full / "cache")
    assert refused.code in (73, 74), refused
    assert "--cache" in refused.err or "cannot write" in refused.err
    assert prune(data, tmp_path / "run", "--cache-dir", full / "cache").code == 0
    both = prune(data, tmp_path / "run", "--cache", "off", "--cache-dir", tmp_path)
    assert both.code == 2
    assert "--cache-dir has no effect with --cache off" in both.err


def test_a_dry_run_says_where_it_would_be_and_writes_nothing(tmp_path: Path, data: Path) -> None:
    done = prune(data, tmp_path / "run", "--cache", "disk", "--dry-run")
    assert done.code == 0, done
    assert f"they are stored in {tmp_path}/run/cache" in done.out
    assert not (tmp_path / "run").exists()


def test_a_run_reads_an_archive_and_later_commands_find_it(tmp_path: Path, data: Path) -> None:
    folder, packed = tmp_path / "folder", tmp_path / "packed"
    archive = shutil.make_archive(str(tmp_path / "food-11"), "zip", data.parent, data.name)
    assert prune(data, folder).code == 0
    done = prune(Path(archive), packed, "--workers", 1)
    assert done.code == 0, done
    assert "food-11.zip" in done.out
    assert weights(packed) == weights(folder)
    done = prune(data, packed)  # the same images, unpacked meanwhile
    assert done.code == 0, done
    assert "the run is finished" in done.out
    scored = gammaslim("evaluate", packed, "--json", "--device", "cpu")
    assert scored.code == 0, scored
    predicted = ("--split", "validation", "--output", tmp_path / "a.csv", "--device", "cpu")
    done = gammaslim("predict", packed, "--data", archive, *predicted)
    assert done.code == 0, done
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 7


def test_a_run_reads_webdataset_shards(tmp_path: Path, data: Path) -> None:
    for name, split in (("train", "training"), ("val", "validation")):
        files = sorted((data / split).iterdir())
        for shard in range(2):
            with tarfile.open(tmp_path / f"{name}-{shard:03}.tar", "w") as archive:
                for file in files[shard::2]:
                    archive.add(file, file.name)
                    label = tarfile.TarInfo(f"{file.stem}.cls")
                    label.size = 1
                    archive.addfile(label, io.BytesIO(file.name[:1].encode()))
    pattern = tmp_path / "{train,val}-{000..001}.tar"
    done = prune(pattern, tmp_path / "run", "--workers", 1, launch=2)
    assert done.code == 0, done
    assert "WebDataset shards" in done.out
    assert "18 training, 6 validation, 3 classes" in done.out
    scored = gammaslim("evaluate", tmp_path / "run", "--json", "--device", "cpu")
    assert scored.code == 0, scored


def test_prepare_builds_the_cache_that_prune_finds(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "ca che"
    for expected in ("built in", "found"):
        done = gammaslim("prepare", "--data", data, "--cache-dir", folder)
        assert done.code == 0, done
        assert f"next: gammaslim prune --data {data} --cache-dir '{folder}'" in done.out
        assert expected in done.out
    shared = gammaslim(
        "launch", "--nproc", 2, "--", "prepare", "--data", data, "--cache-dir", tmp_path / "two"
    )
    assert shared.code == 0, shared
    (one,), (two,) = folder.glob("*.images"), (tmp_path / "two").glob("*.images")
    assert one.read_bytes() == two.read_bytes()
    run = prune(data, tmp_path / "run", "--cache-dir", folder)
    assert run.code == 0, run
    assert re.search(r"cache: .*\.images, found", run.out)


def test_prepare_says_what_it_cannot_do(tmp_path: Path, data: Path) -> None:
    nowhere = gammaslim("prepare", "--data", data, env={"TMPDIR": "", "SLURM_TMPDIR": ""})
    assert nowhere.code == 2
    assert "add --cache-dir PATH" in nowhere.err
    missing = gammaslim("prepare", "--data", tmp_path / "none", "--cache-dir", tmp_path)
    assert missing.code == 66
    write_noise_idx(tmp_path / "idx", 8, 4)
    arrays = gammaslim("prepare", "--data", tmp_path / "idx", "--cache-dir", tmp_path)
    assert arrays.code == 2
    assert "nothing to decode" in arrays.err
