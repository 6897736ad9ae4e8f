"""The Kustomize overlay of a project: what of infra/kuberay/base its configuration changes.

The RayJob is a file inside a ConfigMap, where no patch of Kustomize reaches, so it is filled in here as data.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from jobs.config import as_yaml, read_file
from jobs.sections import Embedding
from pipelines.errors import InputError

RAYJOB = "nightly-rayjob.yaml"
CRONJOB = "catalog-embed-nightly"
IMAGE = "catalog-embed"
# Pods take every variable of this Secret; it may be missing where a workload identity does the work.
SECRET = "catalog-embed-store"  # noqa: S105  a name

_GPU = "nvidia.com/gpu"
_PART = r"[A-Za-z0-9][\w.-]*"
_IMAGE = re.compile(rf"(?P<name>{_PART}(?::\d+(?=/))?(?:/{_PART})*)(?::(?P<tag>\w[\w.-]{{0,127}}))?(?:@(?P<digest>sha256:[0-9a-f]{{64}}))?")
_NAMESPACE = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# 1 / 0.2 is 4.999... in floats.
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """What the base is overlaid with."""

    at: str
    timezone: str
    since: str
    target: str | None
    image: str | None
    namespace: str | None
    embed: Embedding
    variables: tuple[str, ...]

    def __post_init__(self) -> None:
        found = _IMAGE.fullmatch(self.image) if self.image is not None else None
        if self.image is not None and not (found and (found["tag"] or found["digest"])):
            raise InputError(
                f"--image {self.image!r} is no image with a tag or a digest, so every pod could get another. Write registry.example.com/catalog-embed:0.1.0, or name@sha256:DIGEST."
            )
        if (self.namespace or "").startswith("kube-") or self.namespace == "default":
            raise InputError(
                f"--namespace {self.namespace}: the manifests take a whole namespace over (Pod Security, nothing may speak to anything), "
                "so it must be the project's own. Name a new one, such as catalog-embed."
            )
        if self.namespace is not None and not _NAMESPACE.fullmatch(self.namespace):
            raise InputError(f"--namespace {self.namespace!r} is no namespace: small letters, digits and dashes, 63 at most.")


def overlay(base: Path, wanted: Overlay) -> dict[str, bytes]:
    """Return kustomization.yaml and the filled-in RayJob, which lie beside the base and the project's configuration."""
    below = read_file(base / "kustomization.yaml")
    job = rayjob(read_file(base / RAYJOB), wanted)
    head = "# The nightly run on Kubernetes, written by `catalog-embed schedule --to kuberay`: `kubectl apply -k` on this folder.\n"
    if wanted.variables:
        head += (
            f"# The configuration reads {', '.join(wanted.variables)}. Pods take them from the Secret {SECRET}, which is in no file here:\n"
            f"#   kubectl create secret generic {SECRET} --from-env-file=FILE, in the namespace below\n"
        )
    filled = "# Filled in from base/nightly-rayjob.yaml, whose comments give the reasons.\n"
    return {
        "kustomization.yaml": (head + as_yaml(_kustomization(below, wanted))).encode(),
        RAYJOB: (filled + as_yaml(job)).encode(),
    }


def advice(wanted: Overlay) -> list[str]:
    """Say what has to be there, and which choice the configuration made."""
    notes = ["the cluster needs KubeRay and the Secret catalog-embed-ray-token: base/kustomization.yaml has the command that makes it"]
    if wanted.variables:
        notes.append(f"pods take {', '.join(wanted.variables)} from the Secret {SECRET}")
    gpu = _image(wanted.image or "catalog-embed:0.1.0", gpu=True)
    if wanted.image is None:
        notes.append("pods ask for the image catalog-embed:0.1.0, which nodes have to find: name yours with --image")
    if wanted.embed.gpus_per_actor:
        notes.append(f"workers with a GPU have the image {gpu}")
    else:
        notes.append("`embed: gpus_per_actor` is not set, so CPUs embed and no worker has a GPU")
    return notes


def _kustomization(base: Mapping[str, Any], wanted: Overlay) -> dict[str, Any]:
    holders = [item["name"] for item in base["configMapGenerator"] if RAYJOB in item["files"]]
    night = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": CRONJOB},
        "spec": {"schedule": wanted.at, "timeZone": wanted.timezone},
    }
    made: dict[str, Any] = {
        "apiVersion": base["apiVersion"],
        "kind": base["kind"],
        "namespace": wanted.namespace or base["namespace"],
        "resources": ["base"],
        # merge replaces one key of the base's ConfigMap and keeps the others.
        "configMapGenerator": [
            {"name": "catalog-embed-config", "behavior": "merge", "files": ["catalog-embed.yaml"]},
            {"name": holders[0], "behavior": "merge", "files": [RAYJOB]},
        ],
        "generatorOptions": base["generatorOptions"],
        "patches": [{"patch": as_yaml(night)}],
    }
    found = _IMAGE.fullmatch(wanted.image) if wanted.image else None
    if found:
        parts = {"name": IMAGE, "newName": found["name"], "newTag": found["tag"], "digest": found["digest"]}
        made["images"] = [{key: part for key, part in parts.items() if part}]
    return made


def rayjob(base: Mapping[str, Any], wanted: Overlay) -> dict[str, Any]:
    """Return the RayJob with the project's command, image and workers."""
    job = deepcopy(dict(base))
    spec = job["spec"]
    spec["entrypoint"] = _entrypoint(spec["entrypoint"], wanted)
    cluster = spec["rayClusterSpec"]
    cluster["workerGroupSpecs"] = _groups(cluster["workerGroupSpecs"], wanted.embed)
    templates = [spec["submitterPodTemplate"], *(group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]])]
    for pod in templates:
        for container in pod["spec"]["containers"]:
            if wanted.image is not None:
                container["image"] = _image(wanted.image, gpu=container["image"].endswith("-gpu"))
    return job


def _entrypoint(command: str, wanted: Overlay) -> str:
    words = shlex.split(command)
    words[words.index("--since") + 1] = wanted.since
    place = words.index("run")
    return shlex.join([*words[:place], *(["--target", wanted.target] if wanted.target else []), *words[place:]])


def _image(image: str, *, gpu: bool) -> str:
    """Return the image of a pod: GPU workers have the one whose tag ends so, unless a digest names one image for all."""
    return image if not gpu or "@" in image or image.endswith("-gpu") else f"{image}-gpu"


def _groups(groups: list[dict[str, Any]], embed: Embedding) -> list[dict[str, Any]]:
    """Size the workers so that the actors of `embed:` fit; without GPUs for an actor, the other workers embed."""
    others = [group for group in groups if "GPU" not in group["resources"]]
    if not embed.gpus_per_actor:
        for group in others:
            _size_for_cpus(group, embed)
        return others
    for group in groups:
        if "GPU" in group["resources"]:
            _size_for_gpus(group, embed, embed.gpus_per_actor)
    return groups


def _size_for_cpus(group: dict[str, Any], embed: Embedding) -> None:
    """One actor for each machine, and a core of it for those who read."""
    _ask(group, cpus=embed.threads + 1 if embed.threads else None, custom=embed.resources)
    if embed.actors:
        # All of them from the start: actors are counted on the machines that are there.
        group |= dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), embed.actors)


def _size_for_gpus(group: dict[str, Any], embed: Embedding, each: float) -> None:
    """Whole GPUs for a pod, as many actors as fit on them, and half of its cores for those who read and tokenise."""
    gpus = ceil(each)
    fit = max(1, int(gpus / each + _EPSILON))
    least = int(float(group["resources"]["CPU"]))
    cpus = max(least, 2 * fit * embed.threads) if embed.threads else None
    _ask(group, cpus=cpus, gpus=gpus, custom={name: amount * fit for name, amount in embed.resources.items()})
    if embed.actors:
        group["maxReplicas"] = ceil(embed.actors / fit)


def _ask(group: dict[str, Any], *, cpus: int | None, custom: Mapping[str, float], gpus: int | None = None) -> None:
    """Set what Ray counts in a pod and what Kubernetes gives it to the same numbers."""
    given = group["template"]["spec"]["containers"][0]["resources"]
    counted = {name: amount for name, amount in group["resources"].items() if name in {"CPU", "GPU"}}
    if cpus is not None:
        counted["CPU"] = given["requests"]["cpu"] = str(cpus)
    if gpus is not None:
        counted["GPU"] = given["requests"][_GPU] = given["limits"][_GPU] = str(gpus)
    group["resources"] = counted | {name: f"{amount:g}" for name, amount in custom.items()}
