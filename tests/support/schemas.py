"""The schemas that a manifest has to keep: Kubernetes' own, a JobSet's, YAML's."""

from __future__ import annotations

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
        for version in versions:
            try:
                kubernetes_validate.validate(as_job(document), version, strict=True)
            except (ValidationError, SchemaNotFoundError) as error:
                yield f"{version}: {error}"
