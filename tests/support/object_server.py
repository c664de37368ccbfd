"""An S3 server on 127.0.0.1: SeaweedFS, whose package has the program."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCESS, SECRET = "gammaslim-test-access", "gammaslim-test-secret-3141592653"
BUCKET = "bucket"


class ObjectServer:
    """The server with its files in ``folder``; it can be killed, paused and started again."""

    scheme = "s3"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "data").mkdir(parents=True)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        keys = {"accessKey": ACCESS, "secretKey": SECRET}
        identities = {"identities": [{"name": "t", "credentials": [keys], "actions": actions}]}
        (folder / "s3.json").write_text(json.dumps(identities))
        self.ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def environ(self) -> dict[str, str]:
        """The variables with which clients find the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3']}", "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def files(self):  # type: ignore[no-untyped-def]
        """Return the server's files by fsspec."""
        import fsspec

        return fsspec.filesystem(
            "s3", key=ACCESS, secret=SECRET, endpoint_url=self.environ["AWS_ENDPOINT_URL"],
            use_listings_cache=False, skip_instance_cache=True,
        )  # fmt: skip

    def start(self) -> None:
        """Start the server, and wait until it takes files."""
        program = Path(sys.executable).with_name("weed")
        command = [
            program if program.exists() else shutil.which("weed") or program,
            *("server", "-dir", self.folder / "data", "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1"),
            *("-volume.max", "3", "-master.volumeSizeLimitMB", "64", "-volume.preStopSeconds", "0"),
            *("-s3", "-s3.config", self.folder / "s3.json"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-{name}.port={port}" for name, port in self.ports.items()),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self._responds() and self._takes_files():
                return
            time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def _responds(self) -> bool:
        assert self.process
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            urllib.request.urlopen(self.environ["AWS_ENDPOINT_URL"], timeout=2)
        except urllib.error.HTTPError:  # it wants keys
            return True
        except OSError:
            return False
        return True

    def _takes_files(self) -> bool:
        """Return whether files can be written: its parts find each other after it responds."""
        files = self.files()
        try:
            if not files.exists(BUCKET):
                files.mkdir(BUCKET)
            files.pipe_file(f"{BUCKET}/.ready", b"?")
            return bool(files.cat_file(f"{BUCKET}/.ready") == b"?")
        except OSError:
            return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server: SIGSTOP pauses it, SIGCONT continues it."""
        assert self.process
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill the server; what it has taken is on its disk."""
        assert self.process
        self.process.kill()
        self.process.wait()
        for name, port in self.ports.items():  # it has its sockets there, whatever TMPDIR is
            for socket_name in (f"{name}-{port}", f"{name}-grpc-{port + 10_000}"):
                Path(f"/tmp/seaweedfs-{socket_name}.sock").unlink(missing_ok=True)


def free_port() -> int:
    """A port that is free, and whose number plus 10,000, for gRPC, is free too.

    Nothing that connects gets such a port while its server is down: the kernel gives higher ones.
    """
    while True:
        port = random.randrange(12_000, 22_000)
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        return port
