"""The progress of a run on its TrainJob, taken by a server with its own certificate."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from job.artifacts.run_reader import read_run
from job.tracking import kubeflow
from job.tracking.kubeflow import trainer_status, trainjob_progress
from support.commands import ROOT

RUNS = ROOT / "tests" / "support" / "old_runs"
# of the OpenAPI of Kubeflow Trainer 2.3, trainer.v1alpha1.TrainerStatus
STATUS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["lastUpdatedTime"],
    "properties": {
        "progressPercentage": {"type": "integer", "minimum": 0, "maximum": 100},
        "estimatedRemainingSeconds": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
        "lastUpdatedTime": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT[\d:.]+\+00:00$"},
        "metrics": {
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "value"],
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "value": {"type": "string", "minLength": 1},
                },
            }
        },
    },
}


class Server(HTTPServer):
    """Takes posts; answers with ``code``."""

    def __init__(self, cert: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.posts: list[tuple[str, dict[str, str], Any]] = []
        self.code = 200
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.path, dict(self.headers), json.loads(body)))
        self.send_response(self.server.code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "ca.crt", folder / "key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "1", "-subj", "/CN=trainer", "-keyout", key, "-out", cert),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.fixture
def server(
    certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    server = Server(*certificate)
    (tmp_path / "token").write_text("first\n")
    path = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/n/trainjobs/gammaslim/status"
    monkeypatch.setenv(kubeflow.URL, f"https://127.0.0.1:{server.server_port}{path}")
    monkeypatch.setenv(kubeflow.CA, str(certificate[0]))
    monkeypatch.setenv(kubeflow.TOKEN, str(tmp_path / "token"))
    monkeypatch.setattr(kubeflow, "POST_INTERVAL", 0.05)
    yield server
    server.shutdown()
    server.server_close()


def test_the_progress_is_posted_with_the_present_token(server: Server, tmp_path: Path) -> None:
    shutil.copytree(RUNS / "stopped", tmp_path / "run")
    with trainjob_progress(tmp_path / "run"):
        while not server.posts:
            time.sleep(0.01)
        (tmp_path / "token").write_text("second\n")
        shutil.copytree(RUNS / "finished", tmp_path / "run", dirs_exist_ok=True)
    paths, headers, bodies = zip(*server.posts, strict=True)
    assert set(paths) == {
        "/apis/trainer.kubeflow.org/v1alpha1/namespaces/n/trainjobs/gammaslim/status"
    }
    assert headers[0]["Authorization"] == "Bearer first"
    assert headers[-1]["Authorization"] == "Bearer second"
    assert headers[0]["Content-Type"] == "application/json"
    for body in bodies:
        assert set(body) == {"trainerStatus"}
        jsonschema.validate(body["trainerStatus"], STATUS)
    assert 0 < bodies[0]["trainerStatus"]["progressPercentage"] < 100
    assert bodies[-1]["trainerStatus"]["progressPercentage"] == 100


def test_progress_counts_epochs_and_metrics_are_texts() -> None:
    history = read_run(RUNS / "stopped")
    status = trainer_status(history, datetime(2026, 1, 2, tzinfo=UTC))
    base, rounds = history.settings["base"]["epochs"], history.settings["prune"]["rounds"]
    epochs = history.settings["prune"]["epochs"]
    planned = base + rounds * epochs  # type: ignore[operator]
    assert status["progressPercentage"] == 100 * len(history.epochs) // planned
    metrics = {metric["name"]: metric["value"] for metric in status["metrics"]}  # type: ignore[attr-defined]
    assert metrics["round"] == str(history.epochs[-1].round)
    assert float(metrics["valid_acc"]) == pytest.approx(history.epochs[-1].valid_acc, abs=1e-5)
    assert status["lastUpdatedTime"] == "2026-01-02T00:00:00+00:00"


@pytest.mark.parametrize("trouble", ["token", "refused", "certificate", "gone"])
def test_a_server_that_fails_costs_one_warning(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: str,
) -> None:
    server.code = 401 if trouble == "refused" else 200
    if trouble == "token":
        (tmp_path / "token").unlink()
    if trouble == "certificate":
        monkeypatch.delenv(kubeflow.CA)
    if trouble == "gone":
        monkeypatch.setenv(kubeflow.URL, "https://127.0.0.1:9/x")
    with trainjob_progress(RUNS / "finished"):
        time.sleep(0.3)
    assert capsys.readouterr().err.count("progress is not shown on the TrainJob") == 1


def test_elsewhere_nothing_is_posted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kubeflow.URL)
    with trainjob_progress(RUNS / "finished"):
        pass
    assert server.posts == []
