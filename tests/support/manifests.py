"""What a Kubernetes API server, its admission and this job ask of a manifest beyond its schema."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from job import errors
from job.distributed.agent import SHUTDOWN_TIMEOUT
from support.commands import ROOT, run
from support.schemas import Document, as_job

K8S = ROOT / "k8s"
KUBECTL = Path(sys.executable).parent / "kubectl"
RETRY_AT_ONCE = {errors.StopRequest.exit_code}
COUNTED = {1, errors.StorageError.exit_code}
HOPELESS = {
    kind.exit_code
    for kind in (
        errors.UsageError, errors.DataError, errors.InputNotFound, errors.OutputError,
        errors.ConfigError,
    )
}  # fmt: skip
JOB_LABEL = "metadata.labels['batch.kubernetes.io/job-name']"
JOBSET_LABEL = "metadata.labels['jobset.sigs.k8s.io/jobset-name']"
ENUMS = {
    "restartPolicy": {"Never"},
    "completionMode": {"Indexed"},
    "podReplacementPolicy": {"Failed"},
    "fsGroupChangePolicy": {"OnRootMismatch"},
    "action": {"FailJob", "Ignore", "FailJobSet"},
    "operator": {"In", "Exists"},
    "effect": {"NoSchedule"},
    "medium": {"Memory"},
}
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[kMGTP]|[KMGTP]i)?")
UNITS = {"m": Decimal("0.001"), "k": 10**3, **{u: 10 ** (6 + 3 * i) for i, u in enumerate("MGTP")}}
UNITS |= {f"{u}i": 1024 ** (i + 1) for i, u in enumerate("KMGTP")}
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def documents(text: str) -> list[Document]:
    return list(yaml.load_all(text, yaml.CSafeLoader))


def kustomize(folder: Path) -> str:
    done = run(KUBECTL, "kustomize", folder)
    assert (done.code, done.err) == (0, ""), done
    return done.out


def problems(documents: list[Document]) -> Iterator[str]:
    """What an API server or the job would stumble over in documents that keep the schema."""
    kinds = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    if len(kinds) != len(documents):
        yield "two documents of one name"
    for document in documents:
        if not NAME.fullmatch(document["metadata"]["name"]):
            yield f"no name: {document['metadata']['name']}"
    if values := [v for d in documents for v in _values(d, d["kind"])]:
        yield from values
        return
    for document in map(as_job, documents):
        if document["kind"] == "Job":
            yield from _job(document)
            pod = document["spec"]["template"]
            yield from _pod(pod["spec"], kinds)
            yield from _gammaslim(document, kinds)
        elif document["kind"] == "Pod":
            yield from _pod(document["spec"], kinds)


def _values(value: Any, where: str) -> Iterator[str]:
    """Enumerations and quantities, wherever they are."""
    if isinstance(value, list):
        for item in value:
            yield from _values(item, where)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in ENUMS and item not in ENUMS[key]:
            yield f"{where}: {key} {item}"
        if key in ("requests", "limits") and isinstance(item, dict):
            for name, amount in item.items():
                if not QUANTITY.fullmatch(str(amount)):
                    yield f"{where}: {name} {amount}"
        if key == "sizeLimit" and not QUANTITY.fullmatch(str(item)):
            yield f"{where}: {key} {item}"
        if key == "accessModes" and not set(item) <= {"ReadWriteOnce", "ReadWriteMany"}:
            yield f"{where}: {item}"
        if key in ("port", "containerPort") and not 0 < item < 65536:
            yield f"{where}: {key} {item}"
        yield from _values(item, where)


def amount(text: Any) -> Decimal:
    """A quantity of Kubernetes as a number."""
    found = QUANTITY.fullmatch(str(text))
    assert found, text
    return Decimal(found[1]) * (UNITS[found[2]] if found[2] else 1)


def _job(job: Document) -> Iterator[str]:
    spec = job["spec"]
    pod = spec["template"]["spec"]
    if pod.get("restartPolicy") != "Never":
        yield "a podFailurePolicy needs restartPolicy Never"
    if not spec.get("backoffLimit", 0) >= 0:
        yield "backoffLimit"
    nodes = spec.get("completions", 1)
    if spec.get("parallelism", 1) != nodes:
        yield "not all nodes run at once"
    if nodes > 1 and spec.get("completionMode") != "Indexed":
        yield "nodes without a number"
    if spec.get("completionMode") == "Indexed" and "completions" not in spec:
        yield "Indexed without completions"
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    containers = {container["name"] for container in pod["containers"]}
    for rule in rules:
        codes = rule.get("onExitCodes", {})
        if ("onExitCodes" in rule) == ("onPodConditions" in rule):
            yield "a rule is about exit codes or about conditions"
        if codes and codes.get("containerName") not in containers:
            yield "a rule for no container"
        if codes.get("operator", "In") != "In" or 0 in codes.get("values", []):
            yield "a rule that 0 would match"
        if codes and codes["values"] != sorted(set(codes["values"])):
            yield "exit codes must be in order, each once"
    yield from _actions(rules)


def _actions(rules: list[Document]) -> Iterator[str]:
    """What becomes of each exit code: the first rule that matches counts."""
    found: dict[int, str] = {}
    disruption = None
    for rule in rules:
        for code in rule.get("onExitCodes", {}).get("values", []):
            found.setdefault(code, rule["action"])
        if {"type": "DisruptionTarget", "status": "True"} in rule.get("onPodConditions", []):
            disruption = rule["action"]
    expected = dict.fromkeys(HOPELESS, "FailJob") | dict.fromkeys(RETRY_AT_ONCE, "Ignore")
    if found != expected:
        yield f"exit codes {found}, not {expected}"
    if COUNTED & set(found):
        yield "failures that should count do not"
    if disruption != "Ignore":
        yield "disruptions count"


def _pod(pod: Document, kinds: dict[tuple[str, str], Document]) -> Iterator[str]:
    for container in pod["containers"]:
        yield from _resources(container["resources"])
        yield from _restricted(pod.get("securityContext", {}), container.get("securityContext", {}))
        if not re.fullmatch(r".+:[^:/]*\d[^:/]*", container.get("image", "")):
            yield f"image {container.get('image')} without a version"
        names = [entry["name"] for entry in container.get("env", [])]
        if len(set(names)) != len(names):
            yield "a variable twice"
        for entry in container.get("env", []):
            if ("value" in entry) == ("valueFrom" in entry):
                yield f"{entry['name']} has not one value"
    for name in ("automountServiceAccountToken", "enableServiceLinks"):
        if pod.get(name) is not False:
            yield f"{name} is on"
    yield from _volumes(pod, kinds)


def _volumes(pod: Document, kinds: dict[tuple[str, str], Document]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    if len(volumes) != len(pod.get("volumes", [])):
        yield "two volumes of one name"
    used: set[str] = set()
    for container in pod["containers"]:
        mounts = container.get("volumeMounts", [])
        used |= {mount["name"] for mount in mounts}
        if len({mount["mountPath"] for mount in mounts}) != len(mounts):
            yield "two volumes at one place"
    if used != set(volumes):
        yield f"volumes {sorted(volumes)}, mounted {sorted(used)}"
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        config = volume.get("configMap", {}).get("name")
        if claim and ("PersistentVolumeClaim", claim) not in kinds:
            yield f"no claim {claim}"
        if config and ("ConfigMap", config) not in kinds:
            yield f"no ConfigMap {config}"
        if "hostPath" in volume:
            yield "hostPath is not restricted"


def _resources(resources: Document) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name in set(requests) & set(limits):
        if amount(requests[name]) > amount(limits[name]):
            yield f"more {name} requested than allowed"
    for name in {n for n in {*requests, *limits} if "/" in n}:
        if requests.get(name) != limits.get(name):
            yield f"{name}: requests and limits differ"
    if "memory" not in limits or not {"cpu", "memory"} <= set(requests):
        yield "CPU or memory is not said"


def _restricted(pod: Document, container: Document) -> Iterator[str]:
    """The Pod Security level "restricted", a read-only root, and volumes of the user's group."""
    expected = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    if container != expected:
        yield f"container's securityContext {container}"
    if pod.get("runAsNonRoot") is not True or pod.get("seccompProfile") != {
        "type": "RuntimeDefault"
    }:
        yield f"pod's securityContext {pod}"
    for name in ("runAsUser", "runAsGroup", "fsGroup"):
        if not pod.get(name):
            yield f"{name} is root or missing"


def _gammaslim(job: Document, kinds: dict[tuple[str, str], Document]) -> Iterator[str]:
    """What this job needs of its pod."""
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    if pod.get("terminationGracePeriodSeconds", 30) <= SHUTDOWN_TIMEOUT:
        yield "killed before the agent has given up on its processes"
    if spec.get("podReplacementPolicy") != "Failed":
        yield "a pod may begin before its predecessor has ended"
    jobset = any(kind == "JobSet" for kind, _ in kinds)
    if not jobset and not spec.get("ttlSecondsAfterFinished"):
        yield "finished Jobs stay"
    if (spec.get("backoffLimit", 6) == 0) != jobset:
        yield "who restarts?"
    gpus = amount(container["resources"].get("limits", {}).get("nvidia.com/gpu", 0))
    if not gpus or gpus != int(gpus):
        yield "no GPUs"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {
        m["mountPath"]: {**volumes.get(m["name"], {}), **m} for m in container["volumeMounts"]
    }
    yield from _places(mounts, amount(container["resources"]["limits"]["memory"]))
    for path in ("/runs", "/data"):
        name = mounts.get(path, {}).get("persistentVolumeClaim", {}).get("claimName")
        mode = kinds.get(("PersistentVolumeClaim", name), {}).get("spec", {}).get("accessModes")
        many = spec.get("completions", 1) > 1
        if mode != (["ReadWriteMany"] if many else ["ReadWriteOnce"]):
            yield f"{path}: {mode}"
    yield from _arguments(container, mounts.get("/etc/gammaslim", {}), kinds, jobset)
    yield from _network(spec, container, kinds, jobset)


def _places(mounts: dict[str, Document], memory: Decimal) -> Iterator[str]:
    """What can be written, and where it lies."""
    shared = mounts.get("/dev/shm", {}).get("emptyDir", {})
    if shared.get("medium") != "Memory" or not shared.get("sizeLimit"):
        yield "64 MB of shared memory"
    elif amount(shared["sizeLimit"]) >= memory:
        yield "more shared memory than memory"
    for path, kind in (("/tmp", "emptyDir"), ("/runs", "persistentVolumeClaim")):
        if kind not in mounts.get(path, {}) or mounts[path].get("readOnly"):
            yield f"{path} cannot be written, or does not last"


def _arguments(
    container: Document, recipe: Document, kinds: dict[tuple[str, str], Document], jobset: bool
) -> Iterator[str]:
    arguments = container.get("args", [])
    if "command" in container:
        yield "the image's entry point is replaced"
    expected = ["--config=/etc/gammaslim/recipe.toml", "--output=/runs/$(JOB_NAME)"]
    if arguments != ["launch", "--", "prune", *expected]:
        yield f"arguments {arguments}"
    env = {entry["name"]: entry for entry in container.get("env", [])}
    label = JOBSET_LABEL if jobset else JOB_LABEL
    field = env.get("JOB_NAME", {}).get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
    if field != label:
        yield f"the run is named by {field}, not by the Job"
    secret = env.get("WANDB_API_KEY", {}).get("valueFrom", {}).get("secretKeyRef", {})
    if secret.get("optional") is not True or not secret.get("name") or not secret.get("key"):
        yield "there must be a key"
    config = kinds.get(("ConfigMap", recipe.get("configMap", {}).get("name")), {})
    if set(config.get("data", {})) != {"recipe.toml"}:
        yield "no recipe.toml"


def _network(
    spec: Document, container: Document, kinds: dict[tuple[str, str], Document], jobset: bool
) -> Iterator[str]:
    nodes = spec.get("completions", 1)
    if nodes == 1:
        return
    env = {entry["name"]: entry for entry in container.get("env", [])}
    if env.get("NNODES", {}).get("value") != str(nodes):
        yield "NNODES is not the number of nodes"
    if jobset:
        return  # it makes its own Service
    pod = spec["template"]
    service = kinds.get(("Service", pod["spec"].get("subdomain", "")), {}).get("spec", {})
    if service.get("clusterIP") != "None" or service.get("publishNotReadyAddresses") is not True:
        yield "pods have no names before they are ready"
    labels = pod["metadata"]["labels"].items()
    if not service.get("selector") or not service["selector"].items() <= labels:
        yield "the Service is not of these pods"
