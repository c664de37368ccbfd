"""The model card that ``export`` writes: true numbers, metadata that parse, code that runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.commands import gammaslim

CODE = "```python\n"


def export(run: Path, output: Path, *more: object) -> str:
    done = gammaslim("export", run, "--output", output, *more)
    assert done.code == 0, done
    return done.out


def metadata(text: str) -> dict[str, Any]:
    empty, head, _ = text.split("---\n", 2)
    assert empty == ""
    return dict(yaml.safe_load(head))


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2", "m.safetensors", "m.pt"])
def test_the_code_of_a_card_loads_the_model(
    finished_run: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(finished_run, tmp_path / name)
    assert f"model card: {tmp_path}/README.md" in out
    text = (tmp_path / "README.md").read_text()
    code = text.partition(CODE)[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(code, values)
    if name.startswith("m.s") or name == "m.pt":
        assert len(values["state"]) > 20
    else:
        assert tuple(values["logits"].shape) == (1, 3)
    assert ("```cpp" in text) == (name == "m.onnx")


def test_a_card_tells_the_numbers_of_the_run(finished_run: Path, tmp_path: Path) -> None:
    export(finished_run, tmp_path / "m.pt2")
    text = (tmp_path / "README.md").read_text()
    summary = json.loads((finished_run / "summary.json").read_text())
    best = [summary["base"], *summary["rounds"]][int(summary["recommended"][-2:])]
    head = metadata(text)
    assert head["pipeline_tag"] == "image-classification"
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": best["valid_acc"]}]
    assert result["dataset"] == {"name": "food-11", "type": "image-folder", "split": "validation"}
    base = summary["base"]
    share = f"{best['params'] / base['params']:.1%}"
    assert f"| parameters | {best['params']:,} | {base['params']:,} | {share} |" in text
    assert "24 training images, 15 validation images. Its licence is not known" in text
    model = json.loads((finished_run / summary["recommended"] / "model.json").read_text())
    size = model["input"]["size"]
    assert f"(B, 3, {size}, {size}) float32" in text
    assert str(finished_run.parent) not in text  # it may be published


def test_a_readme_of_the_user_is_kept(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for _ in range(2):
        export(finished_run, tmp_path / "m.pt")
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "# student" in (tmp_path / "m.pt.README.md").read_text()
    export(finished_run, tmp_path / "other" / "m.pt", "--no-card")
    assert os.listdir(tmp_path / "other") == ["m.pt"]


def test_each_exported_file_has_its_card(finished_run: Path, tmp_path: Path) -> None:
    for name in ("a `b`.pt", "c.pt", "a `b`.pt"):
        export(finished_run / "rounds" / "01", tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "a `b`.pt", "c.pt", "c.pt.README.md"]
    assert "`` a `b`.pt `` is" in (tmp_path / "README.md").read_text()
    assert "`c.pt` is" in (tmp_path / "c.pt.README.md").read_text()


def test_a_weights_file_has_a_card_without_metrics(finished_run: Path, tmp_path: Path) -> None:
    export(finished_run / "rounds" / "00", tmp_path / "w.pt", "--no-card")
    more = ("--model", "student", "--image-size", 32)
    export(tmp_path / "w.pt", tmp_path / "m.safetensors", *more)
    text = (tmp_path / "README.md").read_text()
    assert "model-index" not in metadata(text)
    assert "## Metrics" not in text
