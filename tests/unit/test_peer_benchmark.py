"""The comparison with other tools: rows of each network and tool, failures, and its own check."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import job
from support.commands import ROOT


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    return importlib.import_module("peer")


def run(benchmark: Any, rows: Path, *options: str) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    try:
        benchmark.main(["run", "--output", str(rows), "--tools", "gammaslim", *options])
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(True)
    return [json.loads(line) for line in rows.read_text("utf-8").splitlines()]


def test_each_network_has_a_row_and_a_second_run_adds_none(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(benchmark, tmp_path / "rows.jsonl", "--networks", "tests/Gat*")
    assert [row["network"] for row in rows] == ["tests/Gate", "tests/Gated"]
    for row in rows:
        assert row["status"] == "cut"
        assert row["params_left"] < 0.5
        assert row["error"] < 1e-12 < 0.01 < row["effect"]
        assert row["conditions"]["commit"]
    assert run(benchmark, tmp_path / "rows.jsonl", "--networks", "tests/Gat*") == rows
    benchmark.main(["table", str(tmp_path / "rows.jsonl")])
    assert "| tests/Gated | 0.00 | 0.29, " in capsys.readouterr().out


@pytest.mark.parametrize("status", ["crash", "timeout", "memory", "broken", "refused", "wrong"])
def test_a_failure_of_a_tool_is_a_row(
    benchmark: Any, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = benchmark.TOOLS["gammaslim"]

    def tool(case: Any) -> Any:
        if status == "crash":
            raise ValueError("no")
        if status == "refused":
            raise benchmark.RefusedError("not this one")
        if status == "memory":
            torch.zeros(2**40)
        if status == "timeout":
            while time.process_time() < 1000:
                pass
        cut = ours(case)
        if status == "broken":
            cut.network.head = torch.nn.Identity()
        return replace(cut, more={"error": 1.0}) if status == "wrong" else cut

    monkeypatch.setattr(benchmark, "warm_up", lambda tools: None)
    monkeypatch.setitem(benchmark.TOOLS, "gammaslim", tool)
    limit = ("--limit", "1") if status == "timeout" else ()
    (row,) = run(benchmark, tmp_path / "rows.jsonl", "--networks", "tests/Residual", *limit)
    assert row["status"] == status


def test_the_check_sees_a_channel_that_is_another(benchmark: Any) -> None:
    check, networks = (importlib.import_module(f"peer_{name}") for name in ("check", "networks"))
    for name in ("Residual", "Grouped", "Scaled", "Normalised", "UNet"):
        case = networks.build(networks.Listed(f"tests/{name}", 64, 64))
        narrow, plan = job.slim(case.network, case.example, policy="uniform", target="width=0.5")
        found = check.outputs64(narrow, case.run, case.example)
        wide = check.without_channels(case.network, plan.layers)
        assert check.difference(found, check.outputs64(wide, case.run, case.example)) < 1e-12
        layer = next(n for n, kept in plan.layers.items() if kept.in_ and len(kept.in_) > 2)
        kept = plan.layers[layer].in_
        assert kept is not None
        wrong = {**plan.layers, layer: replace(plan.layers[layer], in_=kept[:-1])}
        wide = check.without_channels(case.network, wrong)
        assert check.difference(found, check.outputs64(wide, case.run, case.example)) > 1e-7


def test_every_network_of_the_list_has_a_source_and_one_line(benchmark: Any) -> None:
    networks = importlib.import_module("peer_networks")
    names = [entry.name for entry in benchmark.listed()]
    assert len(set(names)) == len(names) > 250
    small = [name.partition("/")[2] for name in names if name.startswith("tests/")]
    assert set(small) == set(networks.SMALL)
    assert {name.partition("/")[0] for name in names} == set(networks.BUILDERS)
