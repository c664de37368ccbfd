"""A container engine of the tests' own: buildah and podman with all they keep in one folder."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

from conftest import ROOT, Result

BASE = "localhost/base:1"
IMAGE = "localhost/gammaslim:test"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


class Engine:
    """buildah and podman, whose images, containers, volumes and locks end with ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("graph", "state", "scratch", "runtime", "tmp"):
            (folder / name).mkdir()
        # overlay needs a file system that can hold it: not another overlay
        driver = "overlay" if _overlay_works(folder) else "vfs"
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver="{driver}"\ngraphroot="{folder}/graph"\nrunroot="{folder}/state"\n'
        )
        self._configure("run.conf", network="private", volumes=[])
        self._configure("build.conf", network="host", volumes=_package_volumes(folder))
        self.environ = {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf",
            "CONTAINERS_CONF": f"{folder}/run.conf",
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": f"{folder}/scratch",
            "XDG_RUNTIME_DIR": f"{folder}/runtime",
        }

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

    def command(self, *args: object) -> list[str]:
        """``podman ARGS`` in words."""
        return ["podman", *map(str, args)]

    def podman(self, *args: object, seconds: float = 300) -> Result:
        """Run ``podman ARGS`` to its end."""
        return self._finished(self.command(*args), self.environ, seconds)

    def popen(self, *args: object) -> subprocess.Popen[str]:
        """Start ``podman ARGS``; its output can be read from it."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command(*args), env=self.environ, stdout=pipe, stderr=pipe, text=True
        )

    def make_base(self) -> None:
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
        self._must(
            "mmdebstrap", "--variant=minbase", "--dpkgopt=force-unsafe-io",
            "--include=ca-certificates,python3,python3-venv",
            *(f"--aptopt={option}" for option in options),
            release["VERSION_CODENAME"], str(tar), *sources,
        )  # fmt: skip
        self._must("podman", "import", "--quiet", str(tar), BASE)
        tar.unlink()

    def build(self) -> Result:
        """Build the project's image on the base that ``make_base`` made."""
        command = [
            "buildah", "build", "--format", "docker", "--tag", IMAGE,
            "--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", "REVISION=tested", str(ROOT),
        ]  # fmt: skip
        environ = {**self.environ, "CONTAINERS_CONF": f"{self.folder}/build.conf"}
        return self._finished(command, environ, 1200)

    def _finished(self, command: list[str], environ: dict[str, str], seconds: float) -> Result:
        return Result(
            subprocess.run(
                command, env=environ, capture_output=True, text=True, timeout=seconds, check=False
            )
        )

    def _must(self, *command: str) -> None:
        done = self._finished(list(command), self.environ, 600)
        assert done.code == 0, done

    def remove(self) -> None:
        """End what still runs and remove every file."""
        self.podman("rm", "--all", "--force", "--time", 0)
        subprocess.run(["umount", "--quiet", f"{self.folder}/graph/overlay"], check=False)
        shutil.rmtree(self.folder)


def _overlay_works(folder: Path) -> bool:
    places = {name: folder / "probe" / name for name in ("lower", "upper", "work", "merged")}
    for place in places.values():
        place.mkdir(parents=True)
    options = "lowerdir={lower},upperdir={upper},workdir={work}".format(**places)
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(places["merged"])]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if mounted:
        subprocess.run(["umount", str(places["merged"])], check=True)
    shutil.rmtree(folder / "probe")
    return mounted


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
    kept |= {"timeout", "default-timeout"}
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
