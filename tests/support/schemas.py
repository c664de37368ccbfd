"""The schemas that a manifest has to keep: Kubernetes' own, those of its extensions, YAML's."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pydantic
from kubernetes_validate.utils import SchemaNotFoundError, ValidationError
from yamllint import linter
from yamllint.config import YamlLintConfig

Document = dict[str, Any]
VERSIONS = ("1.29", "1.31", "1.37")
LINT = YamlLintConfig(
    "extends: default\n"
    "rules: {line-length: {max: 120}, document-start: disable, braces: {max-spaces-inside: 1},"
    " comments: {min-spaces-from-content: 1}}"
)
# of the APIs that Kubernetes itself lacks; they include the Job and the pod within
MODELS = {
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): "JobsetV1alpha2JobSet",
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): "TrainerV1alpha1TrainJob",
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): "TrainerV1alpha1TrainingRuntime",
}
# what this job needs of the JobSet, whose keys and types the model checks
JOBSET = {
    "required": ["ttlSecondsAfterFinished", "network", "failurePolicy", "replicatedJobs"],
    "properties": {
        "network": {"const": {"enableDNSHostnames": True, "publishNotReadyAddresses": True}},
        "failurePolicy": {
            "required": ["maxRestarts", "rules"],
            "properties": {
                "maxRestarts": {"minimum": 1},
                "rules": {
                    "minItems": 1,
                    "items": {
                        "required": ["onJobFailureReasons"],
                        "properties": {
                            "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                            "action": {"const": "FailJobSet"},
                            "onJobFailureReasons": {"const": ["PodFailurePolicy"]},
                        },
                    },
                },
            },
        },
        "replicatedJobs": {
            "minItems": 1,
            "maxItems": 1,
            "items": {
                "properties": {
                    "name": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
                    "replicas": {"const": 1},
                },
            },
        },
    },
}
# of the CustomResourceDefinition of Volcano 1.13, what the manifests use
PODGROUP = {
    "additionalProperties": False,
    "required": ["minMember"],
    "properties": {
        "minMember": {"type": "integer", "minimum": 1},
        "queue": {"type": "string", "minLength": 1},
    },
}
REQUIREMENTS = {"JobSet": JOBSET, "PodGroup": PODGROUP}
WITHOUT_JOB = {"TrainJob", "TrainingRuntime", "PodGroup"}  # no kind of Kubernetes, nor made of one


def lint(text: str) -> Iterator[str]:
    """Duplicate keys, indentation and the like."""
    for problem in linter.run(text, LINT):
        yield f"line {problem.line}: {problem.message}"


def as_job(document: Document) -> Document:
    """The Job that a JobSet makes; others as they are."""
    if document["kind"] != "JobSet":
        return document
    inner = document["spec"]["replicatedJobs"][0]["template"]
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": document["metadata"],
        "spec": inner["spec"],
    }  # fmt: skip


def trainer_model(name: str) -> Any:
    """A model of Kubeflow Trainer; importing them takes more than a second."""
    return getattr(importlib.import_module("kubeflow_trainer_api.models"), name)


def custom(document: Document) -> Iterator[str]:
    """What breaks the schema of an API that Kubernetes itself lacks."""
    kind, version = document["kind"], document["apiVersion"]
    if kind in REQUIREMENTS:
        for error in jsonschema.Draft7Validator(REQUIREMENTS[kind]).iter_errors(document["spec"]):
            yield error.message
    if kind == "PodGroup":
        if version != "scheduling.volcano.sh/v1beta1":
            yield f"no such API: {version} {kind}"
    elif (version, kind) not in MODELS:
        yield f"no such API: {version} {kind}"
    else:
        try:
            kept = trainer_model(MODELS[version, kind]).from_dict(document).to_dict()
        except pydantic.ValidationError as error:
            yield str(error)
        else:  # a model drops the keys that it does not have
            if kept != document:
                yield f"{kind} has only {kept}"


def schema(documents: list[Document], versions: tuple[str, ...] = VERSIONS) -> Iterator[str]:
    """What breaks the schema of a supported version; a kind without one is a problem too."""
    for document in documents:
        if document["kind"] in WITHOUT_JOB | {"JobSet"}:
            yield from custom(document)
        if document["kind"] in WITHOUT_JOB:
            continue
        for version in versions:
            try:
                kubernetes_validate.validate(as_job(document), version, strict=True)
            except (ValidationError, SchemaNotFoundError) as error:
                yield f"{version}: {error}"


def as_controller(documents: list[Document]) -> list[Document]:
    """``documents`` with the JobSet that Kubeflow Trainer makes of a TrainJob and its runtime."""
    kinds = {document["kind"]: document for document in documents}
    job, runtime = copy.deepcopy(kinds["TrainJob"]), copy.deepcopy(kinds["TrainingRuntime"])
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": runtime["apiVersion"].partition("/")[0], "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }  # fmt: skip
    trainer, spec = job["spec"]["trainer"], runtime["spec"]["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    labels = replicated["template"].pop("metadata")["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    nodes = trainer.get("numNodes", runtime["spec"]["mlPolicy"]["numNodes"])
    inner = replicated["template"]["spec"]
    inner |= {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes}
    (container,) = inner["template"]["spec"]["containers"]
    assert container["name"] == "node"
    container |= {"image": trainer["image"], "resources": trainer["resourcesPerNode"]}
    # PET_NNODES, which launch reads as it does NNODES
    container["env"].append({"name": "NNODES", "value": str(nodes)})
    replicated["replicas"] = 1
    network = {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    made = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": job["metadata"],
        "spec": {**spec, "network": network, "ttlSecondsAfterFinished": 0},
    }  # fmt: skip
    others = [d for d in documents if d["kind"] not in ("TrainJob", "TrainingRuntime")]
    return [*others, made]
