"""What the Dockerfile and its requirements promise, read from them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import job
from support.commands import ROOT, run

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, list[tuple[Requirement, list[str]]]]:
    """The pinned requirements by name, each with its hashes."""
    text = (ROOT / ".docker" / "requirements.txt").read_text().replace("\\\n", "")
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            head, *hashes = line.split("--hash=")
            requirement = Requirement(head)
            found.setdefault(requirement.name, []).append(
                (requirement, [h.strip() for h in hashes])
            )
    return found


def pinned(python: str) -> dict[str, str]:
    """Version of each package for one Python on Linux."""
    machine = {
        "python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": "x86_64",
    }  # fmt: skip
    versions = {}
    for name, entries in pins().items():
        for requirement, _ in entries:
            if requirement.marker is None or requirement.marker.evaluate(machine):
                assert name not in versions
                (specifier,) = requirement.specifier
                assert specifier.operator == "=="
                versions[name] = specifier.version
    return versions


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = run(hadolint, "--failure-threshold", "warning", ROOT / "Dockerfile")
    assert (done.code, done.out) == (0, ""), done


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_requirements_are_what_the_project_asks_for(python: str) -> None:
    versions = pinned(python)
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["s3"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[requirement.name]), text
    # the build needs no network for its backend
    assert Requirement("setuptools>=77").specifier.contains(versions["setuptools"])
    assert "triton" not in versions
    for entries in pins().values():
        for _, hashes in entries:
            assert hashes
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes)


def test_what_the_requirements_need_is_among_them() -> None:
    """By the metadata of what is installed here, where it is the same version."""
    from importlib.metadata import PackageNotFoundError, distribution

    versions = pinned(f"{sys.version_info[0]}.{sys.version_info[1]}")
    compared = 0
    for name, version in versions.items():
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if found.version != version:
            continue
        compared += 1
        for text in found.requires or []:
            needed = Requirement(text)
            if needed.name != "triton" and (
                not needed.marker or needed.marker.evaluate({"extra": ""})
            ):
                have = versions[needed.name.lower().replace("_", "-")]
                assert needed.specifier.contains(have, prereleases=True), f"{name}: {text}"
    assert compared > 5


def test_the_image_is_pinned_layered_and_unprivileged() -> None:
    base = r"^ARG BASE_IMAGE=nvidia/cuda:[\d.]+-base-[a-z0-9.]+@sha256:[0-9a-f]{64}$"
    assert re.search(base, DOCKERFILE, re.MULTILINE)
    *_, final = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    lines = [line for line in final.splitlines() if not line.startswith("#")]
    copies = [line for line in lines if line.startswith("COPY")]
    assert copies == ["COPY --from=build /opt/venv /opt/venv", "COPY --from=build /code /"]
    assert not any(line.startswith(("RUN", "ADD")) for line in lines)
    assert "USER 10001:10001" in lines
    assert 'ENTRYPOINT ["gammaslim"]' in lines
    assert f"ARG VERSION={job.__version__}" in lines
    # a new version of the code leaves the layer of the libraries as it was
    assert DOCKERFILE.index("COPY .docker/requirements.txt") < DOCKERFILE.index("COPY job")
    for name in (
        "WANDB_MODE",
        "WANDB_DIR",
        "WANDB_API_KEY",
        "NCCL_DEBUG",
    ):  # the user's and the run's
        assert f"{name}=" not in DOCKERFILE


def test_the_context_is_what_the_build_copies() -> None:
    kept = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    copied = [
        part
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for part in line.split()
    ]
    assert sorted(kept) == sorted(copied)
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert all(any(file == k or file.startswith(f"{k}/") for file in tracked) for k in kept)
