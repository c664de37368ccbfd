"""A stand-in for W&B's server on 127.0.0.1: answers, hangs, resets connections, or says 500.

It speaks what wandb's own service (wandb-core 0.19 to 0.31) asks of it: GraphQL for runs, their
files and artifacts, file streams for history and summary, and uploads.
"""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4


@dataclass
class StoredRun:
    """What the server knows of one W&B run."""

    fields: dict[str, Any] = field(default_factory=dict)  # variables of upsertBucket
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by line
    summary: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0  # file streams that said they were complete
    exit_code: int | None = None
    preempting: bool = False

    def column(self, key: str) -> list[Any]:
        """Values of ``key`` in the order of the history."""
        rows = (row for _, row in sorted(self.history.items()))
        return [row[key] for row in rows if key in row]

    @property
    def config(self) -> dict[str, Any]:
        """Configuration, and as ``args`` the command that W&B shows."""
        values = {key: entry["value"] for key, entry in self.fields["config"].items()}
        (environment, *_) = values.pop("_wandb")["e"].values()
        return {**values, "args": environment["args"]}


class WandbServer:
    """``behaviour``: "answer", "hang", "reset" or "500"; it may change at any time.

    ``turn`` is a behaviour to change to with the first "stream" of values, or at the "finish".
    """

    def __init__(self, behaviour: str = "answer") -> None:
        self.behaviour = behaviour
        self.turn: tuple[str, str] | None = None
        self.runs: dict[str, StoredRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_of = outer

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def env(self) -> dict[str, str]:
        """Variables that lead a job here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    # what the requests do

    def graphql(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        answers = {
            "upsertBucket": self._upsert,
            "missingOk": self._resume_status,
            "createRunFiles": self._run_files,
            "createArtifactFiles": self._artifact_files,
            "createArtifactManifest": self._manifest,
            "updateArtifactManifest": self._manifest,
            "createArtifact": self._artifact,
            "commitArtifact": lambda _: {"commitArtifact": {"artifact": {"id": "a"}}},
            "markRunFilesUploaded": lambda _: {"markRunFilesUploaded": {"success": True}},
            "query ArtifactType": lambda _: {"project": None},
            "serverInfo": lambda _: {"serverInfo": {"features": []}},
            "viewer": lambda _: {"viewer": VIEWER},
        }
        for name, answer in answers.items():
            if name in query:
                return answer(given)
        return {}

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        new = given["name"] not in self.runs
        run = self.runs.setdefault(given["name"], StoredRun())
        known = {key: value for key, value in given.items() if value is not None}
        if "config" in known:
            known["config"] = json.loads(known["config"])
        run.fields |= known
        return {"upsertBucket": {"bucket": self._bucket(given["name"]), "inserted": new}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        rows = [json.dumps(row) for _, row in sorted(run.history.items())]
        project = run.fields.get("project")
        entity = {"id": "e", "name": run.fields.get("entity") or "someone"}
        return {
            "id": f"id-{name}", "name": name, "displayName": run.fields.get("displayName"),
            "description": "", "config": json.dumps(run.fields.get("config", {})),
            "sweepName": None,
            "project": {"id": "p", "name": project, "entity": entity},
            "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps(rows[-1:]), "eventsTail": "[]",
            "summaryMetrics": json.dumps(run.summary), "tags": run.fields.get("tags") or [],
            "notes": run.fields.get("notes"), "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def _resume_status(self, given: dict[str, Any]) -> dict[str, Any]:
        bucket = self._bucket(given["name"]) if given["name"] in self.runs else None
        entity = {"id": "e", "name": given.get("entity") or "someone"}
        return {"model": {"id": "m", "name": given["project"], "entity": entity, "bucket": bucket}}

    def _run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"}
            for name in given["files"]
        ]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(given["input"])
        made = {"id": f"art{len(self.artifacts)}", "state": "PENDING", "artifactSequence": None}
        return {"createArtifact": {"artifact": made}}

    def _manifest(self, _given: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", "uploadUrl": f"{self.url}/upload/manifest", "uploadHeaders": []}
        made = {"artifactManifest": {"id": "am", "file": file}}
        return {"createArtifactManifest": made, "updateArtifactManifest": made}

    def _artifact_files(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = [
            {
                "node": {
                    "storagePath": spec["name"], "uploadHeaders": [], "uploadMultipartUrls": None,
                    "uploadUrl": f"{self.url}/upload/{spec['artifactID']}/{spec['name']}",
                    "artifact": {"id": spec["artifactID"]},
                }
            }
            for spec in given["input"]["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def stream(self, run_id: str, content: dict[str, Any]) -> None:
        run = self.runs.setdefault(run_id, StoredRun())
        for name, part in (content.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                for number, line in enumerate(part["content"], part["offset"]):
                    run.history[number] = json.loads(line)
            elif name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        if content.get("complete"):
            run.attempts += 1
            run.exit_code = content.get("exitcode")
        run.preempting |= bool(content.get("preempting"))

    def behave(self, path: str, body: bytes) -> str:
        """What to do with a request now; makes the turn when it is due."""
        if self.turn and path.endswith("file_stream"):
            at, then = self.turn
            if at == "stream" or json.loads(body or "{}").get("complete"):
                self.turn, self.behaviour = None, then
        return self.behaviour


VIEWER = {
    "id": "v", "entity": "someone", "username": "someone", "email": "someone@example.org",
    "flags": "{}", "teams": {"edges": []}, "admin": False,
}  # fmt: skip


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that go away are no error."""


class _Handler(BaseHTTPRequestHandler):
    server_of: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.server_of
        with server._lock:
            behaviour = server.behave(self.path, body)
            server.requests.append(f"{self.command} {self.path} {body[:90]!r} {behaviour}")
        if behaviour == "hang":
            server.ended.wait()
        if behaviour in ("hang", "reset"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        code, answer = (500, {"error": "it is broken"}) if behaviour == "500" else (200, {})
        if behaviour == "answer":
            code, answer = self._obey(body)
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _obey(self, body: bytes) -> tuple[int, dict[str, Any]]:
        server = self.server_of
        if self.path.startswith("/upload/"):
            server.uploads[self.path.removeprefix("/upload/")] = body
            return 200, {}
        given = self.headers.get("Authorization", "").removeprefix("Basic ")
        if base64.b64decode(given) != f"api:{KEY}".encode():
            return 401, {"errors": [{"message": "user is not logged in"}]}
        content = json.loads(body or "{}")
        with server._lock:
            if self.path == "/graphql":
                query, variables = content["query"], content.get("variables") or {}
                return 200, {"data": server.graphql(query, variables)}
            if self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], content)
                return 200, {"exitcode": None, "limits": {}}
        return 404, {}

    do_GET = do_POST = do_PUT = _answer  # noqa: N815
