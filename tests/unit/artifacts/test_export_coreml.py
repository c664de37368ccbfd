"""Core ML models compute torch's logits, op by op, from the weights that were written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import job
import job.artifacts.export_coreml
from job.cli.command_options import ModelOptions
from job.cli.export import export
from job.errors import GammaslimError, OutputError, UsageError
from support.cuts import NAMES, save_slim_student


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_slim_student(tmp_path_factory.mktemp("slim") / "model")


@pytest.fixture(scope="module")
def exported(slim: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("coremltools")
    output = tmp_path_factory.mktemp("coreml") / "m.mlpackage"
    export(ModelOptions(str(slim)), str(output))
    return output


def opened(package: Path) -> Any:
    import coremltools

    return coremltools.models.MLModel(str(package), skip_model_load=True)


def conv(x: torch.Tensor, weight: torch.Tensor, **given: Any) -> torch.Tensor:
    assert given["pad_type"] in ("custom", "valid")
    top, bottom, left, right = given["pad"] if given["pad_type"] == "custom" else (0, 0, 0, 0)
    x = F.pad(x, (left, right, top, bottom))
    bias, strides, dilations = given.get("bias"), given["strides"], given["dilations"]
    return F.conv2d(x, weight, bias, strides, dilation=dilations, groups=given["groups"])


def max_pool(x: torch.Tensor, **given: Any) -> torch.Tensor:
    assert not any(given["pad"])
    assert not given["ceil_mode"]
    return F.max_pool2d(x, given["kernel_sizes"], given["strides"])


# those of Core ML's ML programs, as its specification defines them
OPS: dict[str, Callable[..., torch.Tensor]] = {
    "conv": conv,
    "relu": lambda x: x.relu(),
    "clip": lambda x, alpha, beta: x.clip(alpha, beta),
    "max_pool": max_pool,
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes, keepdim=keep_dims),
    "reshape": lambda x, shape: x.reshape(shape),
    "squeeze": lambda x, axes: x.squeeze(axes),
    "linear": lambda x, weight, bias: F.linear(x, weight, bias),
}


def computed(package: Path, images: torch.Tensor) -> torch.Tensor:
    """The logits of the program in ``package``, whose ops are computed by torch."""
    from coremltools.converters.mil.frontend.milproto.load import load

    model = opened(package)
    spec = model.get_spec()
    function = load(spec, spec.specificationVersion, model.weights_dir).functions["main"]
    values = {"images": images}

    def value(var: Any) -> Any:
        if var.name in values:
            return values[var.name]
        constant = var.val
        many = getattr(constant, "ndim", 0) > 0
        if many and constant.dtype.kind == "f":
            return torch.from_numpy(constant)
        return tuple(map(int, constant)) if many else getattr(constant, "item", lambda: constant)()

    for op in function.operations:
        if op.op_type != "const":
            given = {name: value(var) for name, var in op.inputs.items() if var is not None}
            values[op.outputs[0].name] = OPS[op.op_type](**given)
    (output,) = function.outputs
    return values[output.name]


def test_the_program_computes_torchs_logits_for_several_batches(slim: Path, exported: Path) -> None:
    network = job.load(slim)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 48, 48)
        torch.testing.assert_close(
            computed(exported, images), network(images), rtol=1e-4, atol=1e-4
        )


def test_input_output_and_metadata_are_those_of_the_other_formats(exported: Path) -> None:
    model = opened(exported)
    description = model.get_spec().description
    (images,), (logits,) = description.input, description.output
    assert (images.name, logits.name) == ("images", "logits")
    sizes = images.type.multiArrayType.shapeRange.sizeRanges
    assert [(size.lowerBound, size.upperBound) for size in sizes] == [
        (1, 64), (3, 3), (48, 48), (48, 48),
    ]  # fmt: skip
    assert list(images.type.multiArrayType.shape) == [1, 3, 48, 48]
    assert json.loads(model.user_defined_metadata["class_names"]) == list(NAMES)
    card = (exported.parent / "README.md").read_text()
    assert "library_name: coreml" in card
    assert 'coremltools.models.MLModel("m.mlpackage")' in card


class StandIn:
    """What `coremltools.convert` returns, with the logits of ``network`` and an error."""

    def __init__(self, network: torch.nn.Module, error: float) -> None:
        self.network, self.error = network, error
        self.user_defined_metadata: dict[str, str] = {}

    def predict(self, given: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            logits = self.network(torch.from_numpy(given["images"]))
        return {"logits": (logits + self.error).numpy()}

    def save(self, path: str) -> None:
        (Path(path) / "Data").mkdir(parents=True)
        (Path(path) / "Manifest.json").write_text("{}")


@pytest.fixture
def convert(slim: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the error of the next conversions, and whether this machine runs Core ML."""

    def set_to(error: float, runs_here: bool) -> None:
        model = StandIn(job.load(slim), error)
        monkeypatch.setattr(job.artifacts.export_coreml, "installed", lambda _: True)
        monkeypatch.setattr(job.artifacts.export_coreml, "_converted", lambda *_: model)
        monkeypatch.setattr(job.artifacts.export_coreml, "_runs_here", lambda: runs_here)

    return set_to


def test_it_says_what_was_compared(
    slim: Path,
    tmp_path: Path,
    convert: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for runs_here, said in (
        (False, r"torch\.export gives the same logits.*macOS only and is not compared"),
        (True, r"Core ML gives the same logits"),
    ):
        convert(1e-6, runs_here)
        export(ModelOptions(str(slim)), str(tmp_path / "m.mlpackage"), card=False)
        assert re.search(said, capsys.readouterr().out)
    convert(1e-2, True)
    with pytest.raises(GammaslimError, match=r"Core ML differs from torch .*nothing is written"):
        export(ModelOptions(str(slim)), str(tmp_path / "other.mlpackage"))
    assert [path.name for path in tmp_path.iterdir()] == ["m.mlpackage"]


def test_a_package_is_replaced_and_no_other_folder(
    slim: Path, tmp_path: Path, convert: Callable[..., None]
) -> None:
    convert(0, False)
    package, own = tmp_path / "m.mlpackage", tmp_path / "own.mlpackage"
    export(ModelOptions(str(slim)), str(package))
    (package / "stale").touch()
    export(ModelOptions(str(slim)), str(package))
    assert {path.name for path in package.iterdir()} == {"Data", "Manifest.json"}
    own.mkdir()
    (own / "work").touch()
    with pytest.raises(OutputError, match="is not a Core ML package: give another name"):
        export(ModelOptions(str(slim)), str(own))
    assert (own / "work").exists()
    with pytest.raises(UsageError, match=r"a folder, NAME\.mlpackage: give --output .*mlpackage"):
        export(ModelOptions(str(slim)), str(tmp_path / "m"), "coreml")


def test_without_the_package_it_says_what_to_install(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.artifacts.export_coreml, "installed", lambda _: False)
    with pytest.raises(UsageError, match=r"pip install 'gammaslim\[coreml\]'") as caught:
        export(ModelOptions(str(slim)), str(tmp_path / "m.mlpackage"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
