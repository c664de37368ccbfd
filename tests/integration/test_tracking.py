"""W&B: what an offline run holds."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2 as pb

from job.config import PruneConfig
from job.pipeline.prune import prune
from job.tracking import wandb_events
from job.tracking.wandb_events import WandbEvent
from support.commands import ROOT, gammaslim
from support.datasets import write_flat, write_noise_idx


def records(run: Path) -> list[Any]:
    """The records of the offline run in ``run``: LevelDB's log format, then protobuf."""
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    content, found, pending = path.read_bytes(), [], b""
    place = 7  # W&B's own header
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        pending += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = pb.Record()
            record.ParseFromString(pending)
            found.append(record)
            pending = b""
    return found


def history(found: list[Any]) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = defaultdict(list)
    for record in found:
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                values[item.key or "/".join(item.nested_key)].append(json.loads(item.value_json))
    return values


def table(run: Path, path: str) -> list[list[Any]]:
    """The rows of a table that the offline run of ``run`` stored at ``path``."""
    (file,) = run.glob(f"wandb/offline-run-*/files/{path}")
    rows: list[list[Any]] = json.loads(file.read_text())["data"]
    return rows


def test_the_offline_run_holds_what_the_run_directory_does(finished_run: Path) -> None:
    found = records(finished_run)
    logged = history(found)
    lines = [json.loads(s) for s in (finished_run / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["event"] == "epoch"]
    for name in ("train_loss", "valid_acc", "lr", "step", "params"):
        assert logged[f"epoch/{name}"] == [line[name] for line in epochs]
    rounds = [line for line in lines if line["event"] == "round"]
    for name in ("valid_acc", "params", "macs", "bytes", "width"):
        assert logged[f"round/{name}"] == [line[name] for line in rounds]
    for block in range(8):
        for when in ("before", "after"):
            name = f"round/gamma_{when}/cnn_{block}_1"
            assert logged[f"{name}/_type"] == ["histogram"] * 3
            assert all(sum(counts) > 0 for counts in logged[f"{name}/values"])
    # the histogram before a round counts the wide network's channels, after it the narrow one's
    assert sum(logged["round/gamma_before/cnn_5_1/values"][1]) == 256
    assert sum(logged["round/gamma_after/cnn_5_1/values"][1]) == 243
    assert logged["layers/_type"] == ["table-file"] * 3
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in found if r.HasField("metric")}
    assert metrics["epoch/*"].step_metric == "epoch/step"
    assert metrics["round/*"].step_metric == "round/round"
    config = {
        update.key: json.loads(update.value_json)
        for record in found
        if record.HasField("run")
        for update in record.run.config.update
    }
    assert config["rate"] == 0.95
    assert config["batch_size"] == 10
    assert len(config["fingerprint"]) == 64
    artifacts = [r.artifact for r in found if r.HasField("artifact")] + [
        r.request.log_artifact.artifact
        for r in found
        if r.HasField("request") and r.request.HasField("log_artifact")
    ]
    models = [a for a in artifacts if a.type == "model"]
    rounds_of_models = [set(a.aliases) - {"latest"} for a in models]
    assert rounds_of_models == [{"round-0", "base"}, {"round-1"}, {"round-2"}, {"recommended"}]
    assert {e.path for e in models[0].manifest.contents} == {
            "evaluation.json", "latency.json", "model.json", "model.safetensors",
        }  # fmt: skip
    (data,) = (a for a in artifacts if a.use_after_commit)
    assert (data.name, data.type) == (f"data-{config['fingerprint'][:12]}", "dataset")
    assert json.loads(models[0].metadata)["lineage"]["base_sha256"]
    assert json.loads(models[-1].metadata)["reason"]
    summary = {
        update.key: json.loads(update.value_json)
        for record in found
        if record.HasField("summary")
        for update in record.summary.update
    }
    assert summary["recommended"].startswith("rounds/")
    recommended = rounds[int(summary["recommended"].removeprefix("rounds/"))]
    for name in ("valid_acc", "params", "macs", "bytes", "latency"):
        assert summary[name] == recommended[name]
    assert summary["params_of_base"] == recommended["params"] / rounds[0]["params"]


def test_the_offline_run_has_charts_of_accuracy_and_of_classes(finished_run: Path) -> None:
    found = records(finished_run)
    charts = {
        update.nested_key[2]: json.loads(update.value_json)["panel_config"]
        for record in found
        if record.HasField("config")
        for update in record.config.update
        if list(update.nested_key[:2]) == ["_wandb", "visualize"]
    }
    costs = {f"accuracy/by_{cost}" for cost in ("params", "macs", "latency")}
    assert set(charts) == {*costs, "confusion/base", "confusion/recommended"}
    fields = charts["accuracy/by_params"]["fieldSettings"]
    assert fields == {"x": "params", "y": "valid_acc"}
    logged = history(found)
    rounds = [json.loads(s) for s in (finished_run / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in rounds if line["event"] == "round"]
    points = table(finished_run, logged["accuracy/by_params_table/path"][-1])
    numbers = [[line["params"], line["valid_acc"]] for line in rounds]
    assert points == [[n, *rest] for n, rest in zip(("base", "1", "2"), numbers, strict=True)]
    cells = table(finished_run, logged["confusion/base_table/path"][0])
    evaluation = json.loads((finished_run / "rounds/00/evaluation.json").read_text())
    assert sum(count for *_, count in cells) == sum(evaluation["counts"])
    wrong = sum(count for true, predicted, count in cells if true != predicted)
    assert wrong == len(evaluation["errors"]["index"])


def test_the_command_of_the_sweep_runs(flat_data: Path, tmp_path: Path) -> None:
    sweep = yaml.safe_load((ROOT / "job" / "recipes" / "sweep.yaml").read_text())
    assert sweep["method"] == "grid"
    options = {name: entry["values"][0] for name, entry in sweep["parameters"].items()}
    args = [f"--{name}={value}" for name, value in options.items()]  # as W&B's agent gives them
    words = {"${env}": [], "${program}": [], "${args}": args}
    command = [word for item in sweep["command"] for word in words.get(item, [item])]
    small = {"data": flat_data, "output": tmp_path / "run", "base_epochs": 0, "epochs": 1,
             "model_arg": "base=4", "workers": 0, "recover": 0}  # fmt: skip
    variables = {f"GAMMASLIM_PRUNE_{name.upper()}": str(value) for name, value in small.items()}
    done = gammaslim(*command, env={**variables, "WANDB_MODE": "offline", "WANDB_SWEEP_ID": "s1"})
    assert done.code == 0, done
    summary = {
        ".".join(update.nested_key) or update.key: update.value_json
        for record in records(tmp_path / "run")
        if record.HasField("summary")
        for update in record.summary.update
    }
    last = json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"][-1]
    assert last["round"] == 1  # also where the base is recommended
    assert json.loads(summary[sweep["metric"]["name"]]) == last["valid_acc"]
    for name, entry in sweep["parameters"].items():
        for value in entry["values"]:
            assert gammaslim("prune", f"--{name}={value}", "--help").code == 0


def test_wandb_is_off_next_to_tensorboard(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data", {"training": 3, "validation": 2})
    done = gammaslim(
        "prune", "--data", data, "--base-epochs", 1, "--rounds", 0, "--wandb", "off",
        "--tracker", "wandb,tensorboard", "--output", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done
    assert not (tmp_path / "run" / "wandb").exists()
    lines = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for event in ("epoch", "round"):
        expected = [line["valid_acc"] for line in lines if line["event"] == event]
        logged = [scalar.value for scalar in events.Scalars(f"{event}/valid_acc")]
        assert logged == pytest.approx(expected, abs=1e-6)


def _unexpected(*_: Any) -> NoReturn:
    raise AssertionError("computed for nobody")


def test_a_run_without_wandb_computes_no_costs_of_layers_and_no_histograms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_events, "layer_costs", _unexpected)
    monkeypatch.setattr(wandb_events, "gamma_histograms", _unexpected)
    monkeypatch.setattr(WandbEvent, "__init__", _unexpected)
    prune(
        PruneConfig(
            data=str(write_noise_idx(tmp_path / "idx", 24, 8)), output=str(tmp_path / "run"),
            model_arg=(("base", 4),), base_epochs=1, rounds=1, epochs=1, batch_size=8,
            wandb="off", workers=0, device="cpu",
        )
    )  # fmt: skip
    assert (tmp_path / "run" / "rounds" / "01").is_dir()
