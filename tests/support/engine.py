"""A container engine of the tests' own: buildah and podman with all they keep in one folder."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

from support.commands import ROOT, Result, clean_environ

BASE = "localhost/base:1"
IMAGE = "localhost/gammaslim:test"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


# What a container engine writes outside of its own folders goes into memory that ends with the
# namespace. Names must still be found where the list of name servers lies below /run.
HOLDER = """
servers=$(readlink -f /etc/resolv.conf) && cp "$servers" "$1/resolv.conf"
mkdir -p /var/lib/containers
for place in /run /var/lib/containers; do mount -t tmpfs tmpfs "$place"; done
[ -e "$servers" ] || { mkdir -p "$(dirname "$servers")" && cp "$1/resolv.conf" "$servers"; }
ip link set lo up
touch "$1/ready"
exec cat
"""


class Engine:
    """buildah and podman in namespaces of their own; all they keep ends with ``folder``.

    Their mounts, networks and processes are not the machine's: ``close`` ends them with one
    process. Builds alone reach the machine's network, for packages. Where ``folder`` is that of an
    engine of another process, it is that engine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            **clean_environ(),
            "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf",
            "CONTAINERS_CONF": f"{folder}/run.conf",
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": f"{folder}/scratch",
            "XDG_RUNTIME_DIR": f"{folder}/runtime",
        }
        first = folder / "first"
        if not first.exists():
            self._start()
            write_whole(first, str(self.first))
        self.first = int(first.read_text())

    def _start(self) -> None:
        folder = self.folder
        for name in ("graph", "state", "scratch", "runtime", "tmp"):
            (folder / name).mkdir()
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
             "--propagation", "private", "sh", "-euc", HOLDER, "holder", str(folder)],
            stdin=subprocess.PIPE,  # everything ends when the tests do, however
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for((folder / "ready").exists, 20)
        (self.first,) = _children(self.holder.pid)
        # overlay needs a file system that can hold it: not another overlay
        driver = "overlay" if self._overlay_works() else "vfs"
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver="{driver}"\ngraphroot="{folder}/graph"\nrunroot="{folder}/state"\n'
        )
        self._configure("run.conf", network="private", volumes=[])
        self._configure("build.conf", network="host", volumes=_package_volumes(folder))

    def _configure(self, name: str, *, network: str, volumes: Sequence[str]) -> None:
        folder = self.folder
        (folder / name).write_text(
            "[containers]\n"
            # the defaults ask for more than a container of a CI may have
            'default_ulimits=["nofile=1024:1024", "nproc=4096:4096"]\n'
            f"netns={json.dumps(network)}\nvolumes={json.dumps(list(volumes))}\n"
            "[network]\n"
            f'network_backend="netavark"\nnetwork_config_dir="{folder}/networks"\n'
            "[engine]\n"
            # crun refuses hybrid cgroups, systemd may not be there
            'runtime="runc"\ncgroup_manager="cgroupfs"\nevents_logger="none"\nlock_type="file"\n'
            f'tmp_dir="{folder}/tmp"\nstatic_dir="{folder}/static"\n'
            f'volume_path="{folder}/volumes"\n'
        )

    def run(
        self, *command: object, network: bool = False, env: dict[str, str] | None = None,
        seconds: float = 600,
    ) -> Result:  # fmt: skip
        """Run a command in the namespaces; with ``network`` in the machine's network."""
        spaces = ["--mount", "--pid", *([] if network else ["--net"])]
        enter = ["nsenter", "--target", str(self.first), *spaces]
        return Result(
            subprocess.run(
                [*enter, *map(str, command)], env={**self.environ, **(env or {})},
                capture_output=True, text=True, timeout=seconds, check=False,
            )
        )  # fmt: skip

    def podman(self, *args: object, seconds: float = 600) -> Result:
        """Run ``podman ARGS`` to its end."""
        return self.run("podman", *args, seconds=seconds)

    def must(self, *args: object, network: bool = False, seconds: float = 600) -> str:
        """What a command prints that has to succeed."""
        done = self.run(*args, network=network, seconds=seconds)
        assert done.code == 0, done
        return done.out.strip()

    def build(self) -> None:
        """Build the project's image from the Dockerfile as it is; ``built`` tells how it ended."""
        try:
            self._make_base()
            built = self._build()
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            built = Result(subprocess.CompletedProcess([], 1, "", str(error)))
        write_whole(self.folder / "built", json.dumps([built.code, built.out, built.err]))

    def built(self) -> Result:
        """How the build ended, of this process or of another one."""
        file = self.folder / "built"
        wait_for(lambda: file.exists() or not self._is_alive(), 1500)
        assert file.exists(), "the engine has ended"
        return Result(subprocess.CompletedProcess([], *json.loads(file.read_text())))

    def _make_base(self) -> None:
        """This machine's distribution with a Python: it stands in for the CUDA base image."""
        release = platform.freedesktop_os_release()
        tar = self.folder / "base.tar"
        apt = Path("/etc/apt")
        sources = [
            str(file)
            for file in (
                apt / "sources.list",
                apt / "sources.list.d" / f"{release['ID']}.sources",
            )
            if file.is_file() and file.stat().st_size
        ]
        options = [
            'Acquire::Check-Valid-Until "false"',  # an archive of a past day will do
            'Acquire::Check-Date "false"',
        ]
        self.must(
            "mmdebstrap", "--variant=minbase", "--dpkgopt=force-unsafe-io",
            "--include=ca-certificates,python3,python3-venv",
            *(f"--aptopt={option}" for option in options),
            release["VERSION_CODENAME"], str(tar), *sources, network=True,
        )  # fmt: skip
        self.must("podman", "import", "--quiet", str(tar), BASE)
        tar.unlink()

    def _build(self) -> Result:
        command = [
            "buildah", "build", "--format", "docker", "--tag", IMAGE,
            "--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", "REVISION=tested", str(ROOT),
        ]  # fmt: skip
        environ = {"CONTAINERS_CONF": f"{self.folder}/build.conf"}
        return self.run(*command, network=True, env=environ, seconds=1500)

    def close(self) -> None:
        """End what still runs and remove every file."""
        self.podman("rm", "--all", "--force", "--time", 0)
        os.kill(self.first, signal.SIGKILL)  # the others and the mounts go with it
        wait_for(lambda: not self._is_alive(), 20)
        for group in Path("/sys/fs/cgroup").glob("**/libpod_parent"):
            for part in sorted(group.glob("**/"), reverse=True):
                with suppress(OSError):
                    part.rmdir()
        shutil.rmtree(self.folder)

    def _is_alive(self) -> bool:
        return Path(f"/proc/{self.first}").exists()

    def _overlay_works(self) -> bool:
        probe = self.folder / "probe"
        places = {name: probe / name for name in ("lower", "upper", "work", "merged")}
        for place in places.values():
            place.mkdir(parents=True)
        options = "lowerdir={lower},upperdir={upper},workdir={work}".format(**places)
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, places["merged"]]
        mounted = self.run(*mount).code == 0
        if mounted:
            self.must("umount", places["merged"])
        shutil.rmtree(probe)
        return mounted


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def write_whole(file: Path, content: str) -> None:
    """Write a file that another process waits for."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(content)
    part.rename(file)


def _package_volumes(folder: Path) -> list[str]:
    """What lets pip within a build reach what pip reaches here: its settings, what they name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda text: text.startswith(":env:")):
        name, _, value = line.partition("=")
        # ``:env:.cert='…'``, which wins over ``global.cert='…'``
        settings[name.rpartition(".")[2]] = value.strip("'\"").replace("\\n", " ")
    volumes = []
    if certificates := settings.get("cert"):
        settings["cert"] = CERTIFICATES
        volumes.append(f"{certificates}:{CERTIFICATES}:ro")
    kept = {"cert", "index-url", "extra-index-url", "find-links", "trusted-host", "proxy"}
    kept |= {"timeout", "default-timeout", "no-index"}
    for name in ("index-url", "extra-index-url", "find-links"):
        for place in settings.get(name, "").split():
            path = Path(urlparse(place).path if place.startswith("file:") else place)
            # an index refers to files beside it
            path = path.parent if "index" in name else path
            if path.is_absolute() and path.is_dir():
                volumes.append(f"{path}:{path}:ro")
    lines = [f"{name} = {value}\n" for name, value in settings.items() if name in kept]
    config = folder / "pip.conf"
    config.write_text("".join(["[global]\n", *lines]))
    return [*dict.fromkeys(volumes), f"{config}:/etc/pip.conf:ro"]


if __name__ == "__main__":  # build the image beside something else, for ``Engine(FOLDER).built()``
    engine = Engine(Path(sys.argv[1]))
    engine.build()
    engine.holder.wait()
