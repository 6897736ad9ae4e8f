"""What Kubernetes and the KubeRay operator would refuse, found without either."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra import manifests as infra
from tests.infra.operator_rules import cron_objections, objections

KUBERNETES = "1.37.0"


@pytest.mark.parametrize("where", [where for where, item in infra.manifests().items() if not item["apiVersion"].startswith("ray.io")])
def test_core_objects_satisfy_the_schemas_of_kubernetes(where: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: schemas are not looked at").validate
    validate(infra.manifests()[where], KUBERNETES, strict=True)


def test_pods_of_ray_kinds_satisfy_the_schema_of_pods() -> None:
    checker = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: schemas are not looked at")
    bodies: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod.spec} for pod in infra.pods()
    ]
    different = {yaml.safe_dump(body): body for body in bodies}
    for body in different.values():
        checker.validate(body, KUBERNETES, strict=True)
    with pytest.raises(checker.ValidationError):
        checker.validate({**bodies[0], "spec": {**bodies[0]["spec"], "toleration": []}}, KUBERNETES, strict=True)


@pytest.mark.parametrize("where", list(infra.ray_jobs()))
def test_the_operator_has_no_objection(where: str) -> None:
    job = infra.ray_jobs()[where]
    name = job["metadata"].get("name", job["metadata"].get("generateName", "") + "xxxxx")
    assert objections(job, name=name) == []


def test_the_operator_has_no_objection_to_the_cron_example() -> None:
    (cron,) = infra.of_kind("RayCronJob").values()
    assert cron_objections(cron) == []
    assert cron_objections({**cron, "metadata": {"name": "n" * 37}})
    assert cron_objections({**cron, "spec": {**cron["spec"], "schedule": "CRON_TZ=UTC 0 2 * * *"}})


def _cluster(job: Any) -> Any:
    return job["spec"]["rayClusterSpec"]


BREAKS: dict[str, Callable[[Any], Any]] = {
    "a typo in the job": lambda job: job["spec"].update(backOffLimit=1),
    "a typo in the cluster": lambda job: _cluster(job).update(rayversion="2.60.0"),
    "a typo in a group": lambda job: _cluster(job)["workerGroupSpecs"][0].update(maxReplica=2),
    "a typo for the autoscaler": lambda job: _cluster(job)["autoscalerOptions"].update(idleTimeout=2),
    "a typo in the head": lambda job: _cluster(job)["headGroupSpec"].update(params={}),
    "tokens without a version": lambda job: _cluster(job).pop("rayVersion"),
    "tokens with an old version": lambda job: _cluster(job).update(rayVersion="2.9.0"),
    "a restart policy with autoscaler v2": lambda job: _cluster(job)["workerGroupSpecs"][0]["template"]["spec"].update(
        restartPolicy="Always"
    ),
    "resources said twice": lambda job: _cluster(job)["headGroupSpec"]["rayStartParams"].update({"num-cpus": "0"}),
    "more replicas than there may be": lambda job: _cluster(job)["workerGroupSpecs"][1].update(replicas=99),
    "a time to live without a shutdown": lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
    "deletion rules beside a shutdown": lambda job: job["spec"].update(deletionStrategy={"deletionRules": [{"policy": "DeleteSelf"}]}),
    "a sidecar with a template": lambda job: job["spec"].update(submissionMode="SidecarMode"),
    "no deadline": lambda job: job["spec"].update(activeDeadlineSeconds=0),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_job_is_objected_to(broken: str) -> None:
    job = copy.deepcopy(infra.ray_jobs()["base/nightly-rayjob.yaml: RayJob catalog-embed-nightly-"])
    BREAKS[broken](job)
    assert objections(job)


def _crds() -> Iterator[tuple[str, Any]]:
    folder = os.environ.get("KUBERAY_CRD_DIR")
    if not folder:
        pytest.skip("KUBERAY_CRD_DIR is not set: Ray kinds are held against our own list of fields only")
    for path in sorted(Path(folder).glob("*.yaml")):
        crd = yaml.safe_load(path.read_text(encoding="utf-8"))
        yield crd["spec"]["names"]["kind"], crd["spec"]["versions"][-1]["schema"]["openAPIV3Schema"]


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON schema that refuses unknown fields, which the API server drops without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not (key == "format" and isinstance(value, str))}
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def defaulted(value: Any, schema: Any) -> Any:
    """The value as the API server stores it: without nulls, with defaults."""
    if isinstance(value, list):
        return [defaulted(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    found = {key: defaulted(item, known.get(key, {})) for key, item in value.items() if item is not None}
    return {key: item["default"] for key, item in known.items() if "default" in item} | found


def test_ray_objects_satisfy_the_schemas_of_kuberay() -> None:
    validator = import_module("jsonschema").Draft202012Validator
    schemas = dict(_crds())
    for where, item in infra.manifests().items():
        if item["apiVersion"] == "ray.io/v1":
            schema = schemas[item["kind"]]
            # `metadata` is an untyped object there, and not ours to judge.
            body = {**defaulted(item, schema), "metadata": {}}
            assert [f"{where}: {error.json_path} {error.message[:200]}" for error in validator(strict(schema)).iter_errors(body)] == []


def test_a_strict_schema_refuses_what_the_api_server_drops() -> None:
    validator = import_module("jsonschema").Draft202012Validator
    schema = {
        "type": "object",
        "required": ["replicas"],
        "properties": {
            "replicas": {"type": "integer", "default": 0, "format": "int32"},
            "port": {"x-kubernetes-int-or-string": True},
            "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    good = {"port": "http", "free": {"any": 1}, "labels": {"a": "b"}, "replicas": None}
    judge = validator(strict(schema))
    assert judge.is_valid(defaulted(good, schema))
    assert not judge.is_valid(defaulted({**good, "replica": 1}, schema))
    assert not judge.is_valid(defaulted({**good, "labels": {"a": 1}}, schema))
