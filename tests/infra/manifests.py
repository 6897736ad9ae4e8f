"""Reading what infra/ holds: the Kubernetes objects in files, the pods in them, and the commands that they run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from jobs.cli import cli

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay"
OVERLAYS = ("gpu-small", "gpu-large")
KUSTOMIZATIONS = ("base", "backfill", "gc", "train", *(f"overlays/{name}" for name in OVERLAYS))

Object = Mapping[str, Any]
# LibYAML's safe loader is ten times as fast.
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod that a manifest leads to, and where in it."""

    where: str
    template: Object

    @property
    def spec(self) -> Object:
        """What the pod is made of."""
        spec: Object = self.template["spec"]
        return spec

    @property
    def component(self) -> str:
        """What network policies know it by."""
        return str(self.template["metadata"]["labels"]["app.kubernetes.io/component"])


def objects(path: Path) -> list[Object]:
    """Every object of a file."""
    return [item for item in yaml.load_all(path.read_text(encoding="utf-8"), Loader) if item]


@cache
def manifests() -> Mapping[str, Object]:
    """Every Kubernetes object below infra/kuberay that stands in a file, by file and name. Copy before you change one."""
    found = {}
    for path in sorted(KUBERAY.rglob("*.yaml")):
        for item in objects(path):
            if "kind" in item and item["kind"] != "Kustomization":
                name = item["metadata"].get("name") or item["metadata"]["generateName"]
                found[f"{path.relative_to(KUBERAY)}: {item['kind']} {name}"] = item
    return found


def of_kind(kind: str) -> dict[str, Object]:
    """The objects of one kind."""
    return {where: item for where, item in manifests().items() if item["kind"] == kind}


def nightly() -> Object:
    """The CronJob of the nightly run."""
    return manifests()["base/nightly.yaml: CronJob catalog-embed-nightly"]


def ray_jobs() -> dict[str, Object]:
    """Every RayJob, and what a RayCronJob makes one of."""
    made = {where: {"metadata": item["metadata"], "spec": item["spec"]["jobTemplate"]} for where, item in of_kind("RayCronJob").items()}
    return of_kind("RayJob") | made


def groups(job: Object) -> list[Object]:
    """The worker groups of a RayJob."""
    found: list[Object] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return found


def group(job: Object, name: str) -> Object:
    """One worker group."""
    return next(item for item in groups(job) if item["groupName"] == name)


def pods_of(where: str, job: Object) -> Iterator[Pod]:
    """The pods of a RayJob: who submits, the head, the workers."""
    spec = job["spec"]
    yield Pod(where=f"{where}, submitter", template=spec["submitterPodTemplate"])
    yield Pod(where=f"{where}, head", template=spec["rayClusterSpec"]["headGroupSpec"]["template"])
    for item in groups(job):
        yield Pod(where=f"{where}, group {item['groupName']}", template=item["template"])


def pods() -> list[Pod]:
    """Every pod that a manifest leads to."""
    found = [pod for where, job in ray_jobs().items() for pod in pods_of(where, job)]
    for where, item in of_kind("CronJob").items():
        found.append(Pod(where=where, template=item["spec"]["jobTemplate"]["spec"]["template"]))
    return found


def parse(words: list[str]) -> click.Context:
    """Parse the words behind `catalog-embed` as the program does, without doing anything."""
    root = cli.make_context("catalog-embed", list(words))
    # As click's own Group.invoke does.
    name, command, rest = cli.resolve_command(root, [*root._protected_args, *root.args])
    assert command is not None
    return command.make_context(name, rest, parent=root)


def rendered(folder: str) -> list[Object]:
    """What `kubectl apply -k` would send."""
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed: what Kustomize makes of the files is not looked at")
    done = subprocess.run([program, "kustomize", str(KUBERAY / folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.load_all(done.stdout, Loader) if item]


def quantity(value: str | float) -> float:
    """A Kubernetes quantity as a number: 250m, 16Gi, 8."""
    text = str(value)
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40), ("m", 1e-3)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
