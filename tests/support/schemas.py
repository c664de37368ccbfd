"""The schemas that a manifest has to keep: Kubernetes' own, a JobSet's, YAML's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
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
# the JobSet's own fields, of jobset.x-k8s.io/v1alpha2; what is within its Job is checked as a Job
JOBSET = {
    "additionalProperties": False,
    "required": ["ttlSecondsAfterFinished", "network", "failurePolicy", "replicatedJobs"],
    "properties": {
        "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
        "network": {
            "const": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        },
        "failurePolicy": {
            "additionalProperties": False,
            "required": ["maxRestarts", "rules"],
            "properties": {
                "maxRestarts": {"type": "integer", "minimum": 1},
                "rules": {
                    "minItems": 1,
                    "items": {
                        "additionalProperties": False,
                        "required": ["name", "action", "onJobFailureReasons"],
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
                "additionalProperties": False,
                "required": ["name", "replicas", "template"],
                "properties": {
                    "name": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
                    "replicas": {"const": 1},
                    "template": {
                        "additionalProperties": False,
                        "required": ["spec"],
                        "properties": {"spec": {"type": "object"}},
                    },
                },
            },
        },
    },
}
# of the CustomResourceDefinitions of Kubeflow Trainer 2.3 and Volcano 1.13, what the manifests use
NAME = {"type": "string", "minLength": 1}
RESOURCES = {
    "type": "object",
    "additionalProperties": False,
    "required": ["requests", "limits"],
    "properties": {"requests": {"type": "object"}, "limits": {"type": "object"}},
}
CUSTOM: dict[tuple[str, str], Document] = {
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): {
        "additionalProperties": False,
        "required": ["runtimeRef", "trainer"],
        "properties": {
            "runtimeRef": {
                "additionalProperties": False,
                "required": ["name", "kind"],
                "properties": {
                    "apiGroup": {"const": "trainer.kubeflow.org"},
                    "kind": {"enum": ["TrainingRuntime", "ClusterTrainingRuntime"]},
                    "name": NAME,
                },
            },
            "suspend": {"type": "boolean"},
            "trainer": {
                "additionalProperties": False,
                "properties": {
                    "image": NAME,
                    "numNodes": {"type": "integer", "minimum": 1},
                    "resourcesPerNode": RESOURCES,
                },
            },
        },
    },
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): {
        "additionalProperties": False,
        "required": ["mlPolicy", "template"],
        "properties": {
            "mlPolicy": {
                "additionalProperties": False,
                "properties": {
                    "numNodes": {"type": "integer", "minimum": 1},
                    "torch": {"type": "object", "maxProperties": 0},
                },
            },
            "podGroupPolicy": {
                "additionalProperties": False,
                "properties": {"volcano": {"type": "object"}, "coscheduling": {"type": "object"}},
            },
            "template": {
                "additionalProperties": False,
                "required": ["spec"],
                "properties": {"spec": {"type": "object"}},
            },
        },
    },
    ("scheduling.volcano.sh/v1beta1", "PodGroup"): {
        "additionalProperties": False,
        "required": ["minMember"],
        "properties": {"minMember": {"type": "integer", "minimum": 1}, "queue": NAME},
    },
}


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


def schema(documents: list[Document], versions: tuple[str, ...] = VERSIONS) -> Iterator[str]:
    """What breaks the schema of a supported version; a kind without one is a problem too."""
    for document in documents:
        if document["kind"] == "JobSet":
            if document["apiVersion"] != "jobset.x-k8s.io/v1alpha2":
                yield f"no such API: {document['apiVersion']}"
            for error in jsonschema.Draft7Validator(JOBSET).iter_errors(document["spec"]):
                yield error.message
        custom = CUSTOM.get((document["apiVersion"], document["kind"]))
        if custom is not None:
            for error in jsonschema.Draft7Validator(custom).iter_errors(document["spec"]):
                yield error.message
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
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
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
