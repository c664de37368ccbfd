"""The image, really built, and the pods of the manifests, really run, stopped and resumed."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.datasets import write_noise_idx
from support.engine import IMAGE, Engine, wait_for
from support.manifests import K8S, documents, kustomize
from support.schemas import Document

UID = 654_321  # nobody's
HARDENED = (
    "--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--network", "none",
    "--user", f"{UID}:{UID}", "--env", "OMP_NUM_THREADS=1",
)  # fmt: skip
RECIPE = {
    "data": "/data/idx", "base_epochs": 30, "rounds": 1, "epochs": 1, "batch_size": 16,
    "checkpoint_every": 0, "workers": 0, "wandb": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with the project's image; of tests/run.sh, which builds it beside other things."""
    given = os.environ.get("ENGINE_OF_TESTS")
    started = Engine(Path(given) if given else tmp_path_factory.mktemp("engine"))
    try:
        if not given:
            started.build()
        built = started.built()
        assert built.code == 0, built
        yield started
    finally:
        started.close()


def shell(engine: Engine, script: str, *options: object) -> str:
    return engine.must(
        "podman", "run", "--rm", *HARDENED, *options, "--entrypoint", "/bin/sh", IMAGE, "-c", script
    )


def test_the_image_is_small_and_nobody_s(engine: Engine) -> None:
    (image,) = json.loads(engine.must("podman", "image", "inspect", IMAGE))
    config = image["Config"]
    assert (config["User"], config["Entrypoint"]) == ("10001:10001", ["gammaslim"])
    assert config["StopSignal"] == "SIGTERM"
    labels = {k.removeprefix("org.opencontainers.image."): v for k, v in config["Labels"].items()}
    assert labels["title"] == "gammaslim"
    assert labels["revision"] == "tested"
    assert shell(engine, "gammaslim --version").endswith(labels["version"])
    assert "gammaslim:x:10001:10001:" in shell(engine, "cat /etc/passwd")
    # torch with CUDA's libraries, once, is 4.7 GB of it; triton would be 0.9 more
    assert image["Size"] < 5.3e9
    found = shell(
        engine,
        "exec 2>/dev/null; command -v gcc cc pip pip3 nvcc; ls -d /usr/local/cuda* /build /code; "
        "ls -d /opt/pip /opt/venv/lib/*/*/triton /opt/venv/lib/*/*/pip; "
        "find / -xdev -name 'libcublas.so*'; "
        "find / -xdev -writable ! -type l ! -path '/proc/*' ! -path '/dev/*' ! -path '/tmp*'; true",
    )
    # no compiler, no installer, no rest of the build, one CUDA, nothing to write but /tmp
    (cublas,) = set(found.splitlines()) - {"/var/tmp", "/run/lock"}
    assert cublas.endswith("nvidia/cu13/lib/libcublas.so.13")


UNCOMPILED = """
import os, sys
import job.pipeline.prune
files = [getattr(module, "__cached__", None) for module in sys.modules.values()]
print([file for file in files if isinstance(file, str) and not os.path.exists(file)])
"""


def test_programs_find_a_home_under_any_user(engine: Engine) -> None:
    home = "import getpass, pathlib; print(getpass.getuser(), pathlib.Path.home())"
    cuda = "import s3fs, torch, torchvision, wandb; print(torch.version.cuda)"
    script = "; ".join(f"python -c '{code}'" for code in (home, cuda, UNCOMPILED))
    out = shell(engine, f"id -u; {script}").split("\n")
    # every module is compiled: nobody could keep what Python compiles
    assert out == [str(UID), "gammaslim /tmp", "13.0", "[]"]


def test_without_a_command_it_runs_the_demonstration(engine: Engine) -> None:
    """With its numbers made small by the environment; all it writes is in /tmp."""
    small = {"BASE_EPOCHS": 1, "ROUNDS": 1, "EPOCHS": 1, "BATCH_SIZE": 128, "MODEL_ARG": "base=4"}
    options = [f"--env=GAMMASLIM_PRUNE_{name}={value}" for name, value in small.items()]
    done = engine.podman("run", "--rm", *HARDENED, *options, IMAGE)
    assert done.code == 0, done
    assert "built-in Fashion-MNIST" in done.out
    assert "all files are in /tmp/runs/demo" in done.out
    assert done.err == ""


def owned(folder: Path, uid: int, gid: int) -> Path:
    folder.mkdir(exist_ok=True)
    os.chown(folder, uid, gid)
    return folder


def rows(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def state(run: Path) -> tuple[str, int]:
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["exit_code"]


def test_sigterm_saves_and_the_same_command_goes_on(engine: Engine, tmp_path: Path) -> None:
    write_noise_idx(tmp_path / "data" / "idx", 48, 20)
    runs = owned(tmp_path / "runs", UID, UID)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in RECIPE.items()]
    command = [
        "run", "--detach", *HARDENED,
        f"--volume={runs}:/runs", f"--volume={tmp_path}/data:/data:ro", IMAGE,
        "prune", *options, "--output", "/runs/one",
    ]  # fmt: skip
    first = engine.must("podman", *command)
    wait_for((runs / "one" / "checkpoints").exists, 300)
    engine.must("podman", "stop", "--time", 60, first)
    assert engine.must("podman", "wait", first) == "75", engine.podman("logs", first)
    assert state(runs / "one") == ("stopped", 75)
    second = engine.must("podman", *command)
    assert engine.must("podman", "wait", second) == "0", engine.podman("logs", second)
    assert state(runs / "one") == ("finished", 0)
    assert len(rows(runs / "one", "resume")) == 1
    assert [row["epoch"] for row in rows(runs / "one", "epoch")] == [*range(30), 0]
    assert {file.lstat().st_uid for file in (runs / "one").rglob("*")} == {UID}


class Cluster:
    """What Kubernetes does with a Job, as far as one engine can: volumes, pods, exit codes."""

    def __init__(self, engine: Engine, manifests: str, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.documents = documents(manifests)
        (self.job,) = [d for d in self.documents if d["kind"] == "Job"]
        (self.config,) = [d for d in self.documents if d["kind"] == "ConfigMap"]
        self.pods = 0

    def place(self, claim: str) -> Path:
        name = ("podman", "volume", "inspect", "--format", "{{.Mountpoint}}", claim)
        return Path(self.engine.must(*name))

    def provision(self) -> None:
        """Make the volumes, of the pod's group as kubelet does it, and put images in."""
        claims = [d for d in self.documents if d["kind"] == "PersistentVolumeClaim"]
        self.play(*claims)
        group = self.job["spec"]["template"]["spec"]["securityContext"]["fsGroup"]
        for claim in claims:
            place = self.place(claim["metadata"]["name"])
            os.chown(place, 0, group)
            place.chmod(0o2775)
        write_noise_idx(self.place("gammaslim-data") / "idx", 48, 20)

    def set_recipe(self, **values: object) -> None:
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
        self.config["data"]["recipe.toml"] = "\n".join(["[prune]", *lines, ""])

    def play(self, *found: Document, options: tuple[str, ...] = ()) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.folder / "play.yaml"
        file.write_text(yaml.safe_dump_all(found))
        self.engine.must("podman", "kube", "play", *options, file)

    def start(self, index: int | None = None, *options: str, **spec: Any) -> str:
        """Create a pod of the Job as its controller would; the container's name."""
        self.pods += 1
        job = self.job["metadata"]["name"]
        pod = copy.deepcopy(self.job["spec"]["template"])
        number = "" if index is None else f"-{index}"
        pod |= {"apiVersion": "v1", "kind": "Pod"}
        pod["metadata"]["name"] = f"{job}{number}-{self.pods}"
        pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] = job
        (container,) = pod["spec"]["containers"]
        container["image"] = IMAGE
        # no GPUs here, and a core for each pod
        container["resources"] = {"limits": {"cpu": "1", "memory": "4Gi"}}
        container["args"] = [a.replace("$(JOB_NAME)", job) for a in container["args"]]
        if index is not None:
            variable = {"name": "JOB_COMPLETION_INDEX", "value": str(index)}
            container["env"].append(variable)
            pod["spec"] |= {"hostname": f"{job}-{index}"}
        pod["spec"] |= spec
        own = [v["name"] for v in pod["spec"]["volumes"] if "emptyDir" in v]
        for entry in [*pod["spec"]["volumes"], *container["volumeMounts"]]:
            if entry["name"] in own:  # podman would share them by name
                entry["name"] += f"-{self.pods}"
        self.play(self.config, pod, options=options or ("--network=none",))
        return f"{pod['metadata']['name']}-{container['name']}"

    def end(self, name: str) -> tuple[int, str, str]:
        """The exit code of a container, what the Job does about it, its log."""
        code = int(self.engine.must("podman", "wait", name))
        log = self.engine.podman("logs", name)
        return code, self.action(code), log.out + log.err

    def action(self, code: int) -> str:
        for rule in self.job["spec"]["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", []):
                return str(rule["action"])
        return "Count" if code else "Complete"


@contextmanager
def cluster(engine: Engine, manifests: str, folder: Path) -> Iterator[Cluster]:
    started = Cluster(engine, manifests, folder)
    try:
        started.provision()
        yield started
    finally:
        engine.must("podman", "pod", "rm", "--all", "--force", "--time", 0)
        engine.must("podman", "volume", "rm", "--all", "--force")


def test_the_pod_of_job_yaml_is_stopped_and_its_successor_ends_the_run(
    engine: Engine, tmp_path: Path
) -> None:
    with cluster(engine, (K8S / "job.yaml").read_text(), tmp_path) as kubernetes:
        kubernetes.set_recipe(**RECIPE)
        run = kubernetes.place("gammaslim-runs") / "gammaslim"
        first = kubernetes.start()
        wait_for((run / "checkpoints").exists, 300)
        status = engine.must("podman", "exec", first, "cat", "/proc/1/status")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split("\t") == ["10001"] * 4
        assert int(fields["CapBnd"], 16) == 0
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
        assert engine.podman("exec", first, "touch", "/opt/x", "/data/x").code == 1
        engine.must("podman", "kill", "--signal", "TERM", first)  # as kubelet
        code, action, log = kubernetes.end(first)
        assert (code, action) == (75, "Ignore"), log
        assert state(run) == ("stopped", 75)
        code, action, log = kubernetes.end(kubernetes.start())
        assert (code, action) == (0, "Complete"), log
        assert state(run) == ("finished", 0)
        assert len(rows(run, "resume")) == 1
        assert {file.lstat().st_gid for file in run.rglob("*")} == {10001}
        kubernetes.set_recipe(**RECIPE | {"rate": 0.9})
        code, action, log = kubernetes.end(kubernetes.start())
        assert (code, action) == (78, "FailJob"), log


def test_the_pods_of_multinode_meet_stop_together_and_go_on(engine: Engine, tmp_path: Path) -> None:
    """Pod 1 comes first, when pod 0 has no name yet; one is stopped, and both save."""
    network = ("podman", "network", "create", "--subnet", "10.89.7.0/24", "pods")
    with cluster(engine, kustomize(K8S / "multinode"), tmp_path) as kubernetes:
        engine.must(*network)
        kubernetes.set_recipe(**RECIPE)
        run = kubernetes.place("gammaslim-runs") / "gammaslim"

        def start(index: int) -> str:
            address, name = f"10.89.7.{10 + index}", f"gammaslim-{index}"
            full = f"{name}.{kubernetes.job['spec']['template']['spec']['subdomain']}.ns.svc.test"
            aliases = [{"ip": address, "hostnames": [full]}]
            option = f"--network=pods:ip={address},alias={full},alias={name}"
            return kubernetes.start(index, option, hostAliases=aliases)

        pods = [start(1)]
        time.sleep(8)
        pods.append(start(0))
        wait_for((run / "checkpoints").exists, 300)
        engine.must("podman", "kill", "--signal", "TERM", pods[0])
        for pod in pods:
            code, action, log = kubernetes.end(pod)
            assert (code, action) == (75, "Ignore"), log
        assert state(run) == ("stopped", 75)
        engine.must("podman", "pod", "rm", "--all", "--force", "--time", 0)
        pods = [start(0), start(1)]
        logs = []
        for pod in pods:
            code, action, log = kubernetes.end(pod)
            assert (code, action) == (0, "Complete"), log
            logs.append(log)
        assert "on 2 processes" in logs[0]
        assert state(run) == ("finished", 0)
        (resumed,) = rows(run, "resume")
        assert (resumed["processes"], resumed["processes_before"]) == (2, 2)
