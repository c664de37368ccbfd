"""``bench`` on a command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import job
from job.models.student import StudentNet
from support.commands import Result, gammaslim

SHORT = ("--seconds", 0.02, "--batch-sizes", "1,4", "--onnx", "off")
MEASURED = {"median", "p90", "p99", "images_per_second", "samples", "outliers", "drift"}
no_onnx = not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))


@pytest.fixture(scope="module")
def small_run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a base and one round, as far as ``bench`` reads it."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    torch.manual_seed(0)
    torch.save(StudentNet(4, num_classes=5).state_dict(), folder.parent / "w.pt")
    for number, target in (("00", "width=1"), ("01", "channels=0.6")):
        done = gammaslim(
            "slim", folder.parent / "w.pt", "--model", "student", "--model-arg", "base=4",
            "--image-size", 32, "--target", target, "--output", folder / "rounds" / number,
        )  # fmt: skip
        assert done.code == 0, done
    (folder / "summary.json").write_text('{"recommended": "rounds/01"}')
    return folder


def bench(*args: object, **more: Any) -> Result:
    done = gammaslim("bench", *args, **more)
    assert done.code == 0, done
    return done


def test_a_run_is_compared_with_its_base(small_run_folder: Path) -> None:
    record = json.loads(bench(small_run_folder, *SHORT, "--json", "--threads", 1).out)
    base, slim = (str(small_run_folder / "rounds" / number) for number in ("00", "01"))
    assert [network["network"] for network in record["networks"]] == [base, slim]
    assert record["networks"][0]["macs"] > record["networks"][1]["macs"]
    assert (record["reference"], record["threads"], record["precision"]) == (base, 1, "fp32")
    assert (record["device"], record["memory_format"]) == ("cpu", "contiguous")
    assert torch.__version__.startswith(record["versions"]["torch"])
    rows = record["measurements"]
    places = [(row["runtime"], row["batch_size"], row["network"]) for row in rows]
    assert places == [("eager", size, name) for size in (1, 4) for name in (base, slim)]
    assert all(set(row["latency"]) == MEASURED for row in rows)
    assert [set(row["speedup"] or ()) for row in rows[:2]] == [set(), {"value", "low", "high"}]
    assert [type(row["faster"]) for row in rows[:2]] == [type(None), bool]
    layers = {layer["layer"]: layer for layer in record["layers"][0]["layers"]}
    assert sum(layer["share_after"] for layer in layers.values()) == pytest.approx(1)
    weights = [name for name, module in job.load(slim).named_modules() if hasattr(module, "weight")]
    assert set(weights) <= set(layers)
    assert record["not_measured"] == []


def test_the_tables_say_what_was_measured_and_what_not(small_run_folder: Path) -> None:
    base, slim = (small_run_folder / "rounds" / number for number in ("00", "01"))
    out = bench(slim, *SHORT, "--memory-format", "channels-last", "--precision", "bf16").out
    first = out.splitlines()[0]
    assert "bf16, channels-last, torch " in first
    assert first.endswith("not measured on a GPU")
    assert "\neager, batch 1\nnetwork" in out
    assert "\neager, batch 4\nnetwork" in out
    assert f"\nlayers of {slim}, batch 4, eager\n" in out
    assert f" than {base}: " in out
    assert "x fewer MACs" in out


def test_a_slim_model_without_its_run_is_compared_with_its_uncut_network(
    small_run_folder: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    (small_run_folder / "rounds" / "01").rename(alone)
    try:
        record = json.loads(bench(alone, alone, *SHORT, "--json").out)
    finally:
        alone.rename(small_run_folder / "rounds" / "01")
    assert [n["network"] for n in record["networks"]] == [f"{alone} before its cuts", str(alone)]
    assert record["networks"][0]["params"] > record["networks"][1]["params"]


def test_a_base_alone_has_no_speed_up(small_run_folder: Path) -> None:
    weights = small_run_folder.parent / "w.pt"
    options = ("--model", "student", "--model-arg", "base=4", "--image-size", 32)
    record = json.loads(bench(weights, *options, *SHORT, "--json").out)
    assert [row["speedup"] for row in record["measurements"]] == [None, None]
    assert record["layers"] == []


@pytest.mark.skipif(no_onnx, reason="needs the extra [onnx]")
def test_onnx_files_and_networks_run_in_onnxruntime(small_run_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "slim.onnx"
    assert gammaslim("export", small_run_folder, "--output", file).code == 0
    base = small_run_folder / "rounds" / "00"
    record = json.loads(bench(base, file, *SHORT[:4], "--json").out)
    rows = record["measurements"]
    assert {(row["runtime"], row["network"]) for row in rows} == {
        ("eager", str(base)), ("onnxruntime", str(base)), ("onnxruntime", str(file))
    }  # fmt: skip
    assert [row["speedup"] is not None for row in rows[-2:]] == [False, True]
    assert "onnxruntime" in record["versions"]
    assert bench(file, *SHORT).out.count("onnxruntime, batch") == 2


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("nowhere",), 66, "nowhere is not a model"),
        (("nowhere.onnx",), 66, "nowhere.onnx does not exist"),
        (("bad.onnx",), 65, "bad.onnx is not an ONNX model"),
        (("w.pt",), 2, "is a weights file: name its network"),
        (("run", "--batch-sizes", "1,0"), 2, "a batch size is at least 1"),
        (("run", "--batch-sizes", "all"), 2, "is not a list of whole numbers"),
        (("run", "--precision", "fp16"), 2, "--precision fp16 needs a GPU"),
        (("run", "--device", "cuda"), 2, "torch finds no CUDA GPU here"),
        ((), 2, "MODEL"),
    ],
)
def test_what_is_wrong_is_named_on_one_line(
    small_run_folder: Path, args: tuple[str, ...], code: int, said: str
) -> None:
    (small_run_folder.parent / "bad.onnx").write_bytes(b"\x00\x01 no model")
    if "--device" in args and torch.cuda.is_available():
        pytest.skip("there is one")
    done = gammaslim("bench", *args, cwd=small_run_folder.parent)
    assert (done.code, done.out) == (code, ""), done
    assert said in done.err
