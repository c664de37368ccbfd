"""The Kubernetes manifests: valid, complete, agreeing with the job and with each other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from job.cli.main import prune_command
from support.commands import ROOT
from support.manifests import K8S, documents, kustomize, problems
from support.schemas import VERSIONS, Document, as_controller, as_job, lint, schema, trainer_model

OVERLAYS = ("multinode", "jobset", "kueue", "volcano")


def wrong(text: str) -> list[str]:
    """All that is wrong with the manifests in ``text``."""
    found = documents(text)
    return [*lint(text), *schema(found), *problems(found)]


def job_of(text: str) -> Document:
    (job,) = [as_job(d) for d in documents(text) if d["kind"] in ("Job", "JobSet")]
    return job


@pytest.mark.parametrize(
    "file", sorted(f for f in K8S.rglob("*.yaml") if f.parent.name != "cloud"), ids=str
)
def test_every_file_is_tidy_and_says_how_to_apply_it(file: Path) -> None:
    text = file.read_text()
    assert list(lint(text)) == []
    if file.name != "references.yaml":
        asked = (
            f"-f {file.relative_to(ROOT)}" if file.parent == K8S else f"-k k8s/{file.parent.name}"
        )
        assert f"kubectl apply {asked}" in text.partition("apiVersion")[0]


@pytest.mark.parametrize("file", ["job.yaml", "multinode/gammaslim.yaml"])
def test_a_file_is_complete_in_itself(file: str) -> None:
    assert wrong((K8S / file).read_text()) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_complete_in_itself(overlay: str) -> None:
    found = documents(kustomize(K8S / overlay))
    assert [*schema(found), *problems(found)] == []
    kinds = {"ConfigMap", "PersistentVolumeClaim"}
    own = {"JobSet"} if overlay == "jobset" else {"Job", "Service"}
    own |= {"PodGroup"} if overlay == "volcano" else set()
    assert {d["kind"] for d in found} == kinds | own


def test_a_trainjob_becomes_the_jobset() -> None:
    """What Kubeflow Trainer makes of it is the JobSet of ``k8s/jobset``, but for two names."""
    text = (K8S / "trainjob.yaml").read_text()
    found = documents(text)
    assert [*lint(text), *schema(found)] == []
    made = as_controller(found)
    assert [*schema(made), *problems(made)] == []
    job, jobset = (
        as_job(next(d for d in all_of if d["kind"] == "JobSet"))
        for all_of in (made, documents(kustomize(K8S / "jobset")))
    )
    pods = [each["spec"]["template"]["spec"] for each in (job, jobset)]
    for pod in pods:
        pod["containers"][0].pop("name")
        pod["containers"][0]["env"].sort(key=lambda entry: str(entry["name"]))
    for each in (job, jobset):
        for rule in each["spec"]["podFailurePolicy"]["rules"]:
            rule.get("onExitCodes", {}).pop("containerName", None)
    assert job["spec"] == jobset["spec"]


@pytest.mark.parametrize("file", ["k8s/README.md", "k8s/trainjob.yaml", "job/tracking/kubeflow.py"])
def test_the_gate_of_the_progress_is_named_as_kubeflow_trainer_names_it(file: str) -> None:
    progress = trainer_model("TrainerV1alpha1TrainJobStatus").model_fields["trainer_status"]
    gate = re.search(r"enabling the (\w+) feature gate", progress.description)
    assert gate
    assert set(re.findall(r"gate `*(\w+)", (ROOT / file).read_text())) == {gate[1]}


def test_each_recipe_of_the_sweep_has_its_index_and_fails_alone(tmp_path: Path) -> None:
    text = (K8S / "sweep.yaml").read_text()
    found = documents(text)
    assert [*lint(text), *schema(found)] == []
    (config,) = [d for d in found if d["kind"] == "ConfigMap"]
    spec = job_of(text)["spec"]
    assert list(config["data"]) == [f"{index}.toml" for index in range(spec["completions"])]
    assert spec["parallelism"] <= spec["completions"]
    rates = set()
    for recipe in config["data"].values():
        (tmp_path / "recipe.toml").write_text(recipe.replace("# data =", "data ="))
        context = prune_command.make_context("prune", ["--config", str(tmp_path / "recipe.toml")])
        rates.add(context.params["rate"])
    assert len(rates) == spec["completions"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["args"][-2:] == [
        "--config=/etc/gammaslim/$(INDEX).toml", "--output=/runs/$(JOB_NAME)/$(INDEX)",
    ]  # fmt: skip
    # a pod of the sweep is that of job.yaml in all else
    single = job_of((K8S / "job.yaml").read_text())["spec"]
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == [
        "FailIndex", "Ignore", "Ignore",
    ]  # fmt: skip
    spec["podFailurePolicy"]["rules"][0]["action"] = "FailJob"
    assert spec["podFailurePolicy"] == single["podFailurePolicy"]
    pods = [each["template"]["spec"] for each in (spec, single)]
    container["args"][-2:] = pods[1]["containers"][0]["args"][-2:]
    container["env"] = [entry for entry in container["env"] if entry["name"] != "INDEX"]
    next(v for v in pods[0]["volumes"] if v["name"] == "recipe")["configMap"]["name"] = "gammaslim"
    assert pods[0] == pods[1]


def test_volcano_starts_all_pods_of_the_group_together(tmp_path: Path) -> None:
    found = documents(edited(tmp_path / "k8s", "volcano"))
    (group,) = [d for d in found if d["kind"] == "PodGroup"]
    (job,) = [d for d in found if d["kind"] == "Job"]
    assert group["spec"]["minMember"] == job["spec"]["completions"] == 5
    pod = job["spec"]["template"]
    assert pod["spec"]["schedulerName"] == "volcano"
    named = pod["metadata"]["annotations"]["scheduling.k8s.io/group-name"]
    assert named == group["metadata"]["name"] == "other"


def test_files_holds_the_volumes_of_the_job() -> None:
    text = (K8S / "files.yaml").read_text()
    claims = [d for d in documents((K8S / "job.yaml").read_text()) if d["kind"].endswith("Claim")]
    assert len(claims) == 2
    found = documents(text)
    assert [*lint(text), *schema(found), *problems([*found, *claims])] == []
    mounts = found[0]["spec"]["containers"][0]["volumeMounts"]
    assert {m["mountPath"] for m in mounts if not m.get("readOnly")} == {"/runs", "/data", "/tmp"}


def test_the_recipe_is_one(tmp_path: Path) -> None:
    for text in ((K8S / "job.yaml").read_text(), (K8S / "multinode/gammaslim.yaml").read_text()):
        (config,) = [d for d in documents(text) if d["kind"] == "ConfigMap"]
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(config["data"]["recipe.toml"].replace("# data =", "data ="))
        context = prune_command.make_context("prune", ["--config", str(recipe)])
        assert context.params["data"] == "/data/food-11"
        assert context.params["rounds"] == 5


def test_the_pods_differ_in_what_they_must() -> None:
    """So that a change in one file is not forgotten in the others."""
    single = job_of((K8S / "job.yaml").read_text())
    many = job_of((K8S / "multinode/gammaslim.yaml").read_text())
    jobset = job_of((K8S / "jobset/gammaslim.yaml").read_text())
    assert many["spec"]["template"]["spec"].pop("subdomain") == "gammaslim"
    pods = [job["spec"]["template"]["spec"] for job in (single, many, jobset)]
    for pod in pods:
        (container,) = pod["containers"]
        container.pop("resources")
        container["env"] = [e for e in container["env"] if e["name"] not in ("JOB_NAME", "NNODES")]
        pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "shm"]
    assert pods[0] == pods[1] == pods[2]
    for job in (single, many, jobset):
        for key in ("backoffLimit", "template", "ttlSecondsAfterFinished"):
            job["spec"].pop(key, None)
    nodes = {"completionMode": "Indexed", "completions": 2, "parallelism": 2}
    assert many["spec"] == jobset["spec"] == {**single["spec"], **nodes}


def edited(folder: Path, overlay: str) -> str:
    """``overlay`` of other nodes, GPUs, image and name, each changed in one place."""
    shutil.copytree(K8S, folder)
    file = folder / overlay / "kustomization.yaml"
    text = file.read_text()
    for old, new in (
        ("completions, value: 2}", "completions, value: 5}"),
        ('value: "8"', 'value: "4"'),
        ("newName: gammaslim", "newName: registry.example/slim"),
        ("newTag: 0.1.0", "newTag: 9.9.9"),
        ("/metadata/name, value: gammaslim}", "/metadata/name, value: other}"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text)
    return kustomize(folder / overlay)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nodes_gpus_image_and_name_are_set_in_one_place_each(tmp_path: Path, overlay: str) -> None:
    text = edited(tmp_path / "k8s", overlay)
    found = documents(text)
    assert [*schema(found), *problems(found)] == []
    job = job_of(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["metadata"]["name"], job["spec"]["completions"]) == ("other", 5)
    assert container["image"] == "registry.example/slim:9.9.9"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert {"name": "NNODES", "value": "5"} in container["env"]
    # the storage is not the run's: it keeps its name, with all runs and images in it
    claims = {d["metadata"]["name"] for d in found if d["kind"] == "PersistentVolumeClaim"}
    assert claims == {"gammaslim-runs", "gammaslim-data"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_prefix_of_an_overlay_on_top_reaches_every_reference(
    tmp_path: Path, overlay: str
) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    top = tmp_path / "k8s" / "top"
    top.mkdir()
    (top / "kustomization.yaml").write_text(f"namePrefix: my-\nresources: [../{overlay}]\n")
    found = documents(kustomize(top))
    assert [*schema(found), *problems(found)] == []
    assert all(d["metadata"]["name"].startswith("my-") for d in found)


def test_kueue_holds_the_job_back_by_its_label() -> None:
    job = job_of(kustomize(K8S / "kueue"))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert "suspend" not in job["spec"]


SINGLE = [
    # typing errors and wrong types, which the schema finds
    ("backoffLimit: 3", "backofLimit: 3"),
    ("backoffLimit: 3", 'backoffLimit: "3"'),
    ("apiVersion: batch/v1", "apiVersion: batch/v2"),
    ("readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true"),
    # what it misses
    ("restartPolicy: Never", "restartPolicy: OnFailure"),
    ("restartPolicy: Never", "restartPolicy: Nver"),
    ("action: FailJob", "action: FailsJob"),
    ("action: FailJob\n", "action: Ignore\n"),
    ("[2, 65, 66, 73, 78]", "[2, 65, 66, 73]"),
    ("[2, 65, 66, 73, 78]", "[0, 2, 65, 66, 73, 78]"),
    ("[2, 65, 66, 73, 78]", "[2, 65, 66, 73, 74, 78]"),
    ("[2, 65, 66, 73, 78]", "[78, 2, 65, 66, 73]"),
    ("values: [75]", "values: [1, 75]"),
    ("operator: In\n          values: [75]", "operator: NotIn\n          values: [75]"),
    ("          containerName: gammaslim\n", "          containerName: job\n"),
    ("type: DisruptionTarget", "type: DisruptionTargets"),
    ("podReplacementPolicy: Failed", "podReplacementPolicy: TerminatingOrFailed"),
    ("terminationGracePeriodSeconds: 120", "terminationGracePeriodSeconds: 30"),
    ("  ttlSecondsAfterFinished: 604800\n", ""),
    ("automountServiceAccountToken: false", "automountServiceAccountToken: true"),
    ("enableServiceLinks: false", "enableServiceLinks: true"),
    ("runAsNonRoot: true", "runAsNonRoot: false"),
    ("runAsUser: 10001", "runAsUser: 0"),
    ("        fsGroup: 10001\n", ""),
    ("type: RuntimeDefault", "type: Unconfined"),
    ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
    ("drop: [ALL]", "drop: [NET_RAW]"),
    ("drop: [ALL]", "drop: [ALL]\n              add: [IPC_LOCK]"),
    ("limits: *resources", 'limits: {memory: 32Gi, nvidia.com/gpu: "2"}'),
    ("limits: *resources", 'limits: {memory: 16Gi, nvidia.com/gpu: "1"}'),
    ("limits: *resources", "limits: {memory: 32Gi}"),
    ("memory: 32Gi", "memory: 32GB"),
    ("storage: 10Gi", "storage: ten"),
    ("sizeLimit: 4Gi", "sizeLimit: 64Gi"),
    ("            medium: Memory\n", ""),
    ("mountPath: /dev/shm", "mountPath: /dev/sh"),
    ("mountPath: /tmp", "mountPath: /runs"),
    ("- name: tmp\n              mountPath", "- name: temp\n              mountPath"),
    ("claimName: gammaslim-runs", "claimName: gammaslim-run"),
    ("configMap:\n            name: gammaslim\n", "configMap:\n            name: recipe\n"),
    ("recipe.toml: |", "recipe: |"),
    ("                  optional: true\n", ""),
    ("- name: WANDB_API_KEY\n", "- name: WANDB_API_KEY\n              value: x\n"),
    ("batch.kubernetes.io/job-name", "batch.kubernetes.io/controller-uid"),
    ("--output=/runs/$(JOB_NAME)", "--output=/runs/$(date)"),
    ("image: gammaslim:0.1.0", "image: gammaslim"),
    ("image: gammaslim:0.1.0", "image: gammaslim:latest"),
    ("  name: gammaslim-data\n", "  name: gammaslim_data\n"),
    ("      restartPolicy: Never\n", "      restartPolicy: Never\n      restartPolicy: Never\n"),
]  # fmt: skip
SEVERAL = [
    ("completionMode: Indexed", "completionMode: Indexd"),
    ("  completionMode: Indexed\n", ""),
    ("  completions: 2\n", ""),
    ("parallelism: 2", "parallelism: 1"),
    ('value: "2"', 'value: "4"'),
    ('value: "2"', "value: 2"),
    ("clusterIP: None", "type: ClusterIP"),
    ("publishNotReadyAddresses: true", "publishNotReadyAddresses: false"),
    ("subdomain: gammaslim", "subdomain: slim"),
    ("selector:\n    app.kubernetes.io/name: gammaslim", "selector:\n    app: gammaslim"),
    ("port: 29500", "port: 295000"),
    ("accessModes: [ReadWriteMany]", "accessModes: [ReadWriteOnce]"),
    ("accessModes: [ReadWriteMany]", "accessModes: [ReadWriteEverywhere]"),
    ('limits:\n              cpu: "32"', 'limits:\n              cpu: "16"'),
]  # fmt: skip
JOBSET = [
    ("jobset.x-k8s.io/v1alpha2", "jobset.x-k8s.io/v1alpha1"),
    ("maxRestarts: 3", "maxRestart: 3"),
    ("maxRestarts: 3", "maxRestarts: 0"),
    ("action: FailJobSet", "action: FailJob"),
    ("onJobFailureReasons: [PodFailurePolicy]", "onJobFailureReasons: [BackoffLimitExceeded]"),
    ("publishNotReadyAddresses: true", "publishNotReadyAddresses: false"),
    ("backoffLimit: 0", "backoffLimit: 6"),
    ("replicas: 1", "replicas: 2"),
    ("jobset.sigs.k8s.io/jobset-name", "batch.kubernetes.io/job-name"),
]
TRAINJOB = [
    ("trainer.kubeflow.org/v1alpha1\nkind: TrainJob", "trainer.kubeflow.org/v1\nkind: TrainJob"),
    ("runtimeRef:", "runtimeReference:"),
    ("numNodes: 2", 'numNodes: "2"'),
    ("numNodes: 2", "numNodes: 2\n    numProcPerNode: auto"),
    ("resourcesPerNode:", "resources:"),
    ("torch: {}", "pytorch: {}"),
    ("torch: {}", "torch: {numProcPerNode: 8}"),
    ("  # podGroupPolicy:\n  #   volcano: {}", "  podGroupPolicy:\n    volcano: {minMember: 2}"),
    ("maxRestarts: 3", "maxRestart: 3"),
    ("podReplacementPolicy: Failed", "podReplacementPolicies: Failed"),
    ("readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true"),
]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        *(("job.yaml", *edit) for edit in SINGLE),
        *(("multinode/gammaslim.yaml", *edit) for edit in SEVERAL),
        *(("jobset/gammaslim.yaml", *edit) for edit in JOBSET),
        *(("trainjob.yaml", *edit) for edit in TRAINJOB),
    ],
    ids=lambda value: re.sub(r"\s+", " ", str(value))[:40],
)
def test_an_error_of_one_line_is_found(file: str, old: str, new: str) -> None:
    text = (K8S / file).read_text()
    shared: list[Any] = []
    if "jobset" in file:  # its volumes and its recipe
        shared = documents((K8S / "multinode/gammaslim.yaml").read_text())
        shared = [d for d in shared if d["kind"] in ("ConfigMap", "PersistentVolumeClaim")]
    head, start, body = text.partition("---\n")
    assert old in body
    changed = head + start + body.replace(old, new, 1)
    found = documents(changed)
    others = [document for document in found if document not in documents(text)]
    assert (
        [*schema(others, VERSIONS[-1:])]
        or [*problems([*found, *shared])]
        or [problem for problem in lint(changed) if "duplication" in problem]
    )
