"""The task files of SkyPilot and dstack: their keys, and what their commands start."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from job.cli.main import prune_command
from job.distributed.topology import Nodes, find_nodes
from job.errors import StopRequest, StorageError
from support.commands import ROOT
from support.schemas import lint

CLOUD = ROOT / "k8s" / "cloud"
TEXT = {"type": "string", "minLength": 1}
CODE = {"type": "integer", "minimum": 0, "maximum": 255}
# the documented keys that the files use, of SkyPilot 0.14 and dstack 0.22
SKYPILOT = {
    "additionalProperties": False,
    "required": ["name", "workdir", "resources", "envs", "setup", "run"],
    "properties": {
        "name": TEXT,
        "workdir": {"const": "."},
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": {
            "additionalProperties": False,
            "properties": {
                "accelerators": {"additionalProperties": {"type": "integer", "minimum": 1}},
                "use_spot": {"type": "boolean"},
                "disk_size": {"type": "integer"},
                "job_recovery": {
                    "additionalProperties": False,
                    "properties": {
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {"type": "array", "items": CODE},
                    },
                },
            },
        },
        "envs": {"additionalProperties": TEXT},
        "setup": TEXT,
        "run": TEXT,
    },
}
DSTACK = {
    "additionalProperties": False,
    "required": ["type", "name", "python", "repos", "env", "commands", "resources", "retry"],
    "properties": {
        "type": {"const": "task"},
        "name": TEXT,
        "nodes": {"type": "integer", "minimum": 1},
        "python": {"enum": ["3.11", "3.12", "3.13"]},
        "repos": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 1},
        "env": {"type": "array", "items": {"pattern": "^[A-Z_]+(=.+)?$"}},
        "commands": {"type": "array", "items": TEXT},
        "resources": {
            "additionalProperties": False,
            "properties": {"gpu": TEXT, "shm_size": TEXT, "disk": TEXT},
        },
        "spot_policy": {"enum": ["spot", "on-demand", "auto"]},
        "stop_duration": {"pattern": r"^\d+[smhdw]$"},
        "retry": {
            "additionalProperties": False,
            "properties": {
                "on_events": {"items": {"enum": ["no-capacity", "interruption", "error"]}},
                "duration": {"pattern": r"^\d+[smhdw]$"},
            },
        },
    },
}


def read(name: str) -> dict[str, Any]:
    task: dict[str, Any] = yaml.safe_load((CLOUD / name).read_text())
    return task


def environ_of(name: str, nodes: int) -> dict[str, str]:
    """The variables of the task file, and those that the service sets on the second node."""
    task = read(name)
    if "envs" in task:
        hosts = "\n".join(f"10.0.0.{number}" for number in range(1, nodes + 1))
        service = {
            "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": str(nodes - 1),
            "SKYPILOT_NODE_IPS": hosts,
        }  # fmt: skip
        return task["envs"] | service
    own = dict(entry.split("=", 1) for entry in task["env"] if "=" in entry)
    return own | {
        "DSTACK_NODES_NUM": str(nodes), "DSTACK_NODE_RANK": str(nodes - 1),
        "DSTACK_MASTER_NODE_IP": "10.0.0.1",
    }  # fmt: skip


def script_of(name: str) -> str:
    task = read(name)
    return task["run"] if "run" in task else " && ".join(task["commands"][1:])


@pytest.mark.parametrize(
    ("name", "schema"), [("skypilot.yaml", SKYPILOT), ("gammaslim.dstack.yml", DSTACK)]
)
def test_a_file_has_documented_keys_only(name: str, schema: dict[str, Any]) -> None:
    assert list(lint((CLOUD / name).read_text())) == []
    jsonschema.Draft7Validator(schema).validate(read(name))


@pytest.mark.parametrize("name", ["skypilot.yaml", "gammaslim.dstack.yml"])
@pytest.mark.parametrize("nodes", [1, 3])
def test_its_commands_start_the_job_on_each_node(tmp_path: Path, name: str, nodes: int) -> None:
    stub = tmp_path / "gammaslim"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"; env > "$OUT"\n')
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(tmp_path / "env")}
    done = subprocess.run(
        ["bash", "-e", "-c", script_of(name)], env={**environ_of(name, nodes), **env},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    launch, dashes, prune, *options = done.stdout.splitlines()
    assert (launch, dashes, prune) == ("launch", "--", "prune")
    params = prune_command.make_context("prune", options).params
    assert params["output"] == "s3://BUCKET/runs/gammaslim"
    assert (params["rounds"], params["rate"]) == (5, 0.95)
    started = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
    )
    found = find_nodes(started)
    assert found == (Nodes() if nodes == 1 else Nodes(3, 2, "10.0.0.1", found.port))


def test_dstack_takes_the_repository_from_its_root() -> None:
    """A path in the file is relative to the file, and dstack takes no folder inside of a clone."""
    (path,) = read("gammaslim.dstack.yml")["repos"]
    assert (CLOUD / path).resolve() == ROOT


def test_skypilot_recovers_from_codes_that_ask_for_it() -> None:
    recovery = read("skypilot.yaml")["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [StorageError.exit_code, StopRequest.exit_code]
