"""Weights files of every age are read without executing anything in them."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from job.artifacts.export import state_dict_bytes
from job.errors import DataError, InputNotFound
from job.models.factory import build_network
from job.models.weights import load_state
from job.models.weights_file import read_state
from support.cuts import randomise
from support.weights_files import State, save_as_the_homework_did, state


def test_the_homeworks_kind_of_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "student_custom_small.bin"
    original = state()
    save_as_the_homework_did(path, original)
    assert not path.read_bytes().startswith(b"PK")
    assert b"cuda:0" in path.read_bytes()
    loaded = read_state(path)
    assert len(loaded) == 72
    network = build_network("student", 11, {})
    load_state(network, loaded, "file")
    for key, value in network.state_dict().items():
        assert torch.equal(value, original[key]), key


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
def test_every_kind_of_file_is_read(tmp_path: Path, name: str) -> None:
    original = state(width_mult=0.5)
    if name.endswith(".safetensors"):
        save_file(original, tmp_path / name)
    else:
        torch.save(original, tmp_path / name)
    loaded = read_state(tmp_path / name)
    assert all(torch.equal(loaded[key], value) for key, value in original.items())


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_a_pickle_with_code_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Code()}, "zip.pt")
    torch.save({"a": Code()}, "legacy.pt", _use_new_zipfile_serialization=False)
    Path("plain.pt").write_bytes(pickle.dumps({"a": Code()}))
    for name in ("zip.pt", "legacy.pt"):
        with pytest.raises(DataError, match=r"Python code \(posix.system\), which is never"):
            read_state(name)
    with pytest.raises(DataError, match="never executed"):
        read_state("plain.pt")
    torch.save(build_network("student", 11, {}), "whole.pt")
    with pytest.raises(DataError, match="StudentNet"):
        read_state("whole.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\3\4 nothing", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_state(tmp_path / name)


def test_a_truncated_file_and_a_missing_one(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"w\.pt"):
        read_state(tmp_path / "w.pt")
    with pytest.raises(InputNotFound, match="do not exist"):
        read_state(tmp_path / "none.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".SafeTensors", ".PTH"])
def test_a_state_dict_is_read_back_whatever_letters_its_suffix_has(
    tmp_path: Path, suffix: str
) -> None:
    network = build_network("student", 3, {"base": 2})
    (tmp_path / f"w{suffix}").write_bytes(state_dict_bytes(network, suffix))
    assert read_state(tmp_path / f"w{suffix}").keys() == network.state_dict().keys()


def test_weights_saved_in_half_precision_counters_included_are_taken() -> None:
    half = {key: value.half() for key, value in state().items()}
    network = build_network("student", 11, {})
    load_state(network, half, "w.pt")
    for key, value in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert (value.dtype, value.item()) == (torch.int64, 0)
        else:
            assert torch.equal(value, half[key].float())


def other(change: str) -> State:
    values = state()
    if change == "classes":
        return randomise(build_network("student", 10, {})).state_dict()
    if change == "width":
        return state(width_mult=0.95)
    if change == "missing":
        del values["cnn.3.1.weight"]
    elif change == "extra":
        values["cnn.9.0.weight"] = torch.zeros(1)
    elif change == "nan":
        values["cnn.3.1.weight"][0] = float("nan")
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("classes", "they have 10 classes instead of 11"),
        (
            "width",
            r"cnn\.3\.3\.weight is \(121, 64, 1, 1\), expected \(128, 64, 1, 1\).*width_mult",
        ),
        ("missing", r"they lack cnn\.3\.1\.weight"),
        ("extra", r"they also have cnn\.9\.0\.weight"),
        ("nan", r"not finite, in cnn\.3\.1\.weight"),
    ],
)
def test_what_does_not_fit_is_said(change: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_state(build_network("student", 11, {}), other(change), "w.bin")


@pytest.mark.parametrize("kind", ["float8", "sparse", "meta", "negative variance", "shape"])
def test_tensors_that_make_no_sense_are_refused(tmp_path: Path, kind: str) -> None:
    values = state()
    if kind == "float8":
        values = {k: v.to(torch.float8_e4m3fn) if v.dim() > 1 else v for k, v in values.items()}
        values["fc.0.weight"] = values["fc.0.weight"].float() * float("inf")
    elif kind == "sparse":
        values["fc.0.weight"] = values["fc.0.weight"].to_sparse()
    elif kind == "meta":
        values["fc.0.weight"] = values["fc.0.weight"].to("meta")
    elif kind == "negative variance":
        values["cnn.5.1.running_var"][3] = -1
    else:
        values["fc.0.bias"] = torch.tensor(1.0)
    torch.save(values, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"w\.pt"):
        load_state(build_network("student", 11, {}), read_state(tmp_path / "w.pt"), "w.pt")


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    for name in ("w.bin", "W.SAFETENSORS"):
        save_file(state(), tmp_path / name)
        assert len(read_state(tmp_path / name)) == 72


def test_something_else_than_a_state_dict(tmp_path: Path) -> None:
    for number, value in enumerate(([1], {}, {"epoch": 3}, {1: torch.zeros(1)}, torch.zeros(3))):
        torch.save(value, tmp_path / f"{number}.pt")
        with pytest.raises(DataError, match="state dict"):
            read_state(tmp_path / f"{number}.pt")


def prefixed(prefix: str, values: State) -> State:
    return {prefix + key: value for key, value in values.items()}


def averaged(network: torch.nn.Module) -> State:
    return AveragedModel(network).state_dict()


SMALL = randomise(build_network("student", 3, {"base": 2}))
PLAIN = SMALL.state_dict()
AS_OTHERS_SAVE = {
    "DataParallel": prefixed("module.", PLAIN),
    "torch.compile of DataParallel": prefixed("_orig_mod.module.", PLAIN),
    "AveragedModel": averaged(SMALL),
    "torchvision's average alone": {"model_ema": averaged(SMALL), "epoch": 3},
    "torchvision's, with the model": {"model": PLAIN, "model_ema": {"n_averaged": torch.zeros(1)}},
    "timm's average": {"state_dict_ema": prefixed("module.", PLAIN), "metric": 0.5},
    "Lightning": {"state_dict": prefixed("model.", PLAIN), "loops": {}},
    "Lightning, compiled": {"state_dict": prefixed("model._orig_mod.", PLAIN)},
    "Lightning with a weighted loss": {
        "state_dict": {**prefixed("net.", PLAIN), "criterion.weight": torch.ones(3)}
    },
    "Lightning beside an average": {
        "state_dict": {**prefixed("model.", PLAIN), **prefixed("ema.module.", PLAIN)}
    },
    "an owner of another name": {"state_dict": prefixed("backbone.", PLAIN)},
    "DataParallel of a part": {"state_dict": prefixed("model.module.", PLAIN)},
    "thop's counters": {
        **PLAIN, "total_ops": torch.zeros(1), "cnn.0.total_params": torch.zeros(1)
    },
    "numbers beside weights": {**PLAIN, "epoch": 3, "best": np.float64(0.5), "name": "x"},
    "a NumPy score": {"state_dict": PLAIN, "best": np.float64(0.5), "rng": np.arange(5)},
    "what counts": {"model_state_dict": PLAIN, "at": Path("x"), "counts": Counter("ab")},
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", AS_OTHERS_SAVE)
def test_checkpoints_as_others_save_them(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save(AS_OTHERS_SAVE[name], tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    network = build_network("student", 3, {"base": 2})
    notes = load_state(network, read_state(tmp_path / "w.pt"), "w.pt").notes
    for key, value in network.state_dict().items():
        assert torch.equal(value, PLAIN[key]), key
    assert any("criterion.weight" in line for line in notes) == (name.endswith("weighted loss"))


def test_which_of_two_networks_is_asked() -> None:
    two = prefixed("student.", PLAIN) | prefixed("teacher.", PLAIN)
    with pytest.raises(DataError, match=r"several networks, under student\.\* and teacher\.\*"):
        load_state(build_network("student", 3, {"base": 2}), two, "w.pt")


class Data:
    """Pickled as an object of NumPy's: what would be called is not."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return np.savetxt, ("executed", "x")


def test_what_stands_beside_weights_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": PLAIN, "x": Data()}, "w.pt")
    assert len(read_state("w.pt")) == len(PLAIN)
    torch.save({"state_dict": PLAIN, "x": Code()}, "code.pt")
    with pytest.raises(DataError, match=r"posix.system"):
        read_state("code.pt")
    assert not Path("executed").exists()


class Versioned(nn.Module):
    """Refuses weights without its version, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def _load_from_state_dict(self, *args: Any) -> None:
        if args[2].get("version") != 2:
            raise ValueError(f"version should be 2 instead of {args[2].get('version')}")
        super()._load_from_state_dict(*args)


def test_a_network_that_asks_for_its_version_loads_from_tensors_alone() -> None:
    network, saved = Versioned(), {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
    load_state(network, saved, "w.safetensors")
    assert torch.equal(network.fc.weight, saved["fc.weight"])
