"""What the KubeRay operator refuses after the API server has accepted: its rules for RayJob, RayCluster and RayCronJob.

Restated from ray-operator/controllers/ray/utils/validation.go and constant.go of ray-project/kuberay, as far as they touch
our manifests; and the fields of its types, where a typo is else dropped without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Services and pods add to these names, which end at 63 characters.
MAX_RAYCLUSTER_NAME = 53
MAX_RAYJOB_NAME = MAX_RAYCLUSTER_NAME - 6
MAX_RAYCRONJOB_NAME = 36


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FIELDS: Mapping[str, frozenset[str]] = {
    "RayJob": _words(
        "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus entrypointNumGpus "
        "entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML "
        "shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished"
    ),
    "RayCluster": _words(
        "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec headServiceAnnotations "
        "historyServerOptions managedBy networkPolicy rayVersion suspend tlsOptions upgradeStrategy workerGroupSpecs"
    ),
    "head": _words("enableIngress headService ingressOptions labels rayStartParams resources serviceType template"),
    "group": _words(
        "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority rayStartParams replicas resources "
        "scaleStrategy suspend template"
    ),
    "autoscaler": _words(
        "args command env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode version volumeMounts"
    ),
    "auth": _words("enableK8sTokenAuth mode secretName"),
    "submitter": frozenset({"backoffLimit"}),
    "RayCronJob": _words("jobTemplate schedule suspend timeZone"),
}
MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
# `ray start --num-cpus` and its like say the same as `resources`, and only one of them may.
_START_RESOURCES = frozenset({"num-cpus", "num-gpus", "memory", "resources"})
_AUTH_SINCE = (2, 52)


def objections(job: Mapping[str, Any], *, name: str | None = None) -> list[str]:
    """Return everything that the operator would refuse about a RayJob."""
    return [*_of_name(name), *_of_job(job["spec"]), *_of_cluster(job["spec"]["rayClusterSpec"])]


def cron_objections(cron: Mapping[str, Any]) -> list[str]:
    """Return everything that the operator would refuse about a RayCronJob."""
    spec, name = cron["spec"], cron["metadata"]["name"]
    found = [f"RayCronJob: no field {key}" for key in sorted(set(spec) - FIELDS["RayCronJob"])]
    if len(name) > MAX_RAYCRONJOB_NAME:
        found.append(f"name: {name} is longer than {MAX_RAYCRONJOB_NAME}")
    if "TZ" in spec["schedule"] or len(spec["schedule"].split()) != 5:
        found.append(f"schedule: {spec['schedule']} is not five fields without a zone")
    return [*found, *objections({"spec": spec["jobTemplate"]})]


def _of_name(name: str | None) -> Iterator[str]:
    if name is not None and not (_LABEL.fullmatch(name) and len(name) <= MAX_RAYJOB_NAME):
        yield f"name: {name} is no DNS label of at most {MAX_RAYJOB_NAME} characters"


def _of_job(spec: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"RayJob: no field {key}" for key in sorted(set(spec) - FIELDS["RayJob"]))
    yield from (f"submitterConfig: no field {key}" for key in sorted(set(spec.get("submitterConfig", {})) - FIELDS["submitter"]))
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in MODES:
        yield f"submissionMode: {mode}"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "SidecarMode takes neither submitterPodTemplate nor submitterConfig"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"{key}: must be positive"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit: must not be negative"
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("ttlSecondsAfterFinished", 0) and not shuts_down:
        yield "ttlSecondsAfterFinished: only with shutdownAfterJobFinishes"
    if spec.get("deletionStrategy", {}).get("deletionRules") and shuts_down:
        yield "deletionStrategy: deletionRules exclude shutdownAfterJobFinishes"


def _of_cluster(spec: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"RayCluster: no field {key}" for key in sorted(set(spec) - FIELDS["RayCluster"]))
    yield from _of_auth(spec)
    options = spec.get("autoscalerOptions", {})
    yield from (f"autoscalerOptions: no field {key}" for key in sorted(set(options) - FIELDS["autoscaler"]))
    head = {"groupName": "head", **spec["headGroupSpec"]}
    yield from (f"head: no field {key}" for key in sorted(set(spec["headGroupSpec"]) - FIELDS["head"]))
    for group in (head, *spec.get("workerGroupSpecs", [])):
        yield from _of_group(group, scaled=spec.get("enableInTreeAutoscaling", False) and options.get("version", "v2") == "v2")


def _of_auth(spec: Mapping[str, Any]) -> Iterator[str]:
    auth = spec.get("authOptions", {})
    yield from (f"authOptions: no field {key}" for key in sorted(set(auth) - FIELDS["auth"]))
    if auth.get("mode", "token") == "token" and auth:
        version = re.match(r"(\d+)\.(\d+)", str(spec.get("rayVersion", "")))
        if version is None or tuple(map(int, version.groups())) < _AUTH_SINCE:
            yield f"authOptions: token needs rayVersion 2.52 or later, not {spec.get('rayVersion')}"
    if auth.get("enableK8sTokenAuth"):
        yield "authOptions: enableK8sTokenAuth is not for RayJobs"


def _of_group(group: Mapping[str, Any], *, scaled: bool) -> Iterator[str]:
    name = group["groupName"]
    if name != "head":
        yield from (f"{name}: no field {key}" for key in sorted(set(group) - FIELDS["group"]))
        low, now, high = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
        if not low <= now <= high:
            yield f"{name}: minReplicas {low} <= replicas {now} <= maxReplicas {high} does not hold"
    if group.get("resources") and _START_RESOURCES & set(group.get("rayStartParams", {})):
        yield f"{name}: both resources and rayStartParams say what a node has"
    if "labels" in group.get("rayStartParams", {}):
        yield f"{name}: labels do not belong in rayStartParams"
    if not group["template"]["spec"].get("containers"):
        yield f"{name}: no container"
    policy = group["template"]["spec"].get("restartPolicy")
    if scaled and policy not in (None, "Never"):
        yield f"{name}: restartPolicy {policy}, but autoscaler v2 wants Never"
