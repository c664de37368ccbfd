"""OpenVINO models give torch's logits; without the package a line says what to install."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import job
import job.artifacts.export
import job.artifacts.export_openvino
from job.cli.command_options import ModelOptions
from job.cli.export import export
from job.errors import GammaslimError, OutputError, UsageError
from support.cuts import NAMES, save_slim_student


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_slim_student(tmp_path_factory.mktemp("slim") / "model")


@pytest.fixture(scope="module")
def exported(slim: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    output = tmp_path_factory.mktemp("openvino") / "m.xml"
    export(ModelOptions(str(slim)), str(output))
    return output


def test_openvino_gives_torchs_logits_for_any_batch(slim: Path, exported: Path) -> None:
    import openvino

    model = openvino.Core().read_model(exported)
    assert [str(side) for side in model.input("images").partial_shape][1:] == ["3", "48", "48"]
    assert json.loads(model.get_rt_info(["gammaslim", "class_names"]).value) == list(NAMES)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    network = job.load(slim)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 48, 48)
        logits = torch.from_numpy(compiled({"images": images.numpy()})["logits"].copy())
        torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-4)


def code_of(card: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


def test_the_programs_of_its_card_print_the_same_logit(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    monkeypatch.chdir(exported.parent)
    card = Path("README.md").read_text()
    assert "library_name: openvino" in card
    values: dict[str, torch.Tensor] = {}
    exec(code_of(card, "python"), values)
    compiler, wheel = shutil.which("g++"), Path(openvino.__file__).parent
    (library, *_), headers = wheel.glob("libs/libopenvino.so.*"), wheel / "include"
    if not compiler or not headers.is_dir():
        pytest.skip("no C++ compiler, or a wheel without headers")
    Path("m.cpp").write_text(code_of(card, "cpp"))
    words = ["-std=c++17", f"-I{headers}", "m.cpp", str(library), f"-Wl,-rpath,{wheel / 'libs'}"]
    subprocess.run([compiler, *words, "-o", "m"], check=True)
    out = subprocess.run(["./m"], check=True, capture_output=True, text=True).stdout
    assert float(out) == pytest.approx(float(values["logits"][0, 0]), rel=1e-3, abs=1e-5)


def test_a_model_that_differs_is_not_written(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    compare = job.artifacts.export.compare

    def strict(runtime: str, *args: object) -> str:
        monkeypatch.setattr(job.artifacts.export, "TOLERANCE", -1.0)
        return compare(runtime, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(job.artifacts.export_openvino, "compare", strict)
    with pytest.raises(GammaslimError, match=r"openvino differs from torch .*nothing is written"):
        export(ModelOptions(str(slim)), str(tmp_path / "m.xml"))
    assert not list(tmp_path.iterdir())


def test_without_the_package_it_says_what_to_install(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.artifacts.export_openvino, "installed", lambda _: False)
    with pytest.raises(UsageError, match=r"pip install 'gammaslim\[openvino\]'") as caught:
        export(ModelOptions(str(slim)), str(tmp_path / "m.xml"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_kept(
    slim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.artifacts.export_openvino, "installed", lambda _: True)
    (tmp_path / "m.bin").write_text("a state dict")
    with pytest.raises(OutputError, match="a file of another model"):
        export(ModelOptions(str(slim)), str(tmp_path / "m.xml"))
    with pytest.raises(
        UsageError, match=r"two files, NAME\.xml and NAME\.bin: give --output .*xml"
    ):
        export(ModelOptions(str(slim)), str(tmp_path / "pipe"), "openvino")
    assert (tmp_path / "m.bin").read_text() == "a state dict"
