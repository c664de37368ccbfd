"""A server of Google Cloud Storage on 127.0.0.1, without keys: gcp-storage-emulator."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from support.object_server import BUCKET, free_port


class CloudServer:
    """The server with its files in ``folder``."""

    scheme = "gs"

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        program = Path(sys.executable).with_name("gcp-storage-emulator")
        self.process = subprocess.Popen(
            [
                *(program, "-d", folder, "start", "--quiet", "--default-bucket", BUCKET),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/storage/v1/b/{BUCKET}", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > until or self.process.poll() is not None:
                    raise
                time.sleep(0.1)

    @property
    def environ(self) -> dict[str, str]:
        """The variables with which clients find the server; it has no gRPC, which gcsfs tries."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def files(self):  # type: ignore[no-untyped-def]
        """Return the server's files by fsspec; needs the variables of ``environ``."""
        import fsspec

        return fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
