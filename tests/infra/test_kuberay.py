"""The manifests of infra/kuberay: who may do what, what fits where, what ends when, and whether their commands are ours."""

from __future__ import annotations

import copy
import shlex
from dataclasses import fields
from importlib import metadata
from typing import Any

import click
import pytest
import yaml

from jobs.settings import Settings, load
from pipelines.pool import PoolOptions, pool
from tests.infra import manifests as infra
from tests.infra.operator_rules import MAX_RAYJOB_NAME, objections

ENTRYPOINT = "catalog-embed -c /etc/catalog-embed/catalog-embed.yaml"
RESTRICTED_POD = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED_CONTAINER = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
WRITABLE = {"name": "tmp", "mountPath": "/tmp"}  # noqa: S108  a mount in a pod
# A CronJob adds 11 characters to its name, and start-and-wait.sh four to that.
CRON_SUFFIX = "-12345678-run"


def settings_of(job: infra.Object, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The example's settings as the driver of a RayJob reads them."""
    (head,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    for item in head.get("env", []):
        monkeypatch.setenv(item["name"], item["value"])
    return load(infra.KUBERAY / "base" / "catalog-embed.yaml")


def nodes_of(job: infra.Object) -> list[dict[str, float]]:
    """The nodes of a RayJob's cluster when it has grown as far as it may, as Ray names their resources."""
    cluster = job["spec"]["rayClusterSpec"]
    sizes = [(1, cluster["headGroupSpec"]["resources"]), *((item["maxReplicas"], item["resources"]) for item in infra.groups(job))]
    return [{name: float(value) for name, value in resources.items()} for count, resources in sizes for _ in range(count)]


def test_names_that_the_cron_job_leads_to_are_short_enough() -> None:
    cron = infra.nightly()
    assert not objections(
        infra.ray_jobs()["base/nightly-rayjob.yaml: RayJob catalog-embed-nightly-"], name=cron["metadata"]["name"] + CRON_SUFFIX
    )
    assert len(cron["metadata"]["name"] + CRON_SUFFIX) <= MAX_RAYJOB_NAME


@pytest.mark.parametrize("folder", infra.KUSTOMIZATIONS)
def test_kustomize_renders_and_puts_everything_into_one_namespace(folder: str) -> None:
    items = infra.rendered(folder)
    assert {item["metadata"].get("namespace") for item in items if item["kind"] != "Namespace"} == {"catalog-embed"}


@pytest.mark.parametrize("overlay", infra.OVERLAYS)
def test_an_overlay_changes_nothing_but_the_night_s_rayjob(overlay: str) -> None:
    def key(item: Any) -> tuple[str, str]:
        return item["kind"], item["metadata"]["name"]

    base = {key(item): item for item in infra.rendered("base")}
    over = {key(item): item for item in infra.rendered(f"overlays/{overlay}")}
    assert base.keys() == over.keys()
    (changed,) = [name for name, item in base.items() if item != over[name]]
    assert changed == ("ConfigMap", "catalog-embed-nightly")
    held, mine = base[changed]["data"], over[changed]["data"]
    assert held["start-and-wait.sh"] == mine["start-and-wait.sh"]
    assert mine["nightly-rayjob.yaml"] == (infra.KUBERAY / "overlays" / overlay / "nightly-rayjob.yaml").read_text()


# What a size may be about. Everything else is the same in every RayJob of the nightly run.
SIZES = {
    "headGroupSpec": ("env", "requests", "limits", "sizeLimit", "object-store-memory"),
    "workerGroupSpecs": ("maxReplicas", "resources", "sizeLimit", "object-store-memory"),
}


def without(value: Any, keys: tuple[str, ...]) -> Any:
    """The value without some keys, at any depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "where",
    [where for where in infra.ray_jobs() if where.startswith(("overlays/", "examples/", "backfill/"))],
)
def test_other_sizes_of_the_nightly_cluster_differ_in_sizes_only(where: str) -> None:
    base = infra.ray_jobs()["base/nightly-rayjob.yaml: RayJob catalog-embed-nightly-"]["spec"]
    other = infra.ray_jobs()[where]["spec"]
    for part, keys in SIZES.items():
        assert without(base["rayClusterSpec"][part], keys) == without(other["rayClusterSpec"][part], keys)
    assert without(base["rayClusterSpec"], tuple(SIZES)) == without(other["rayClusterSpec"], tuple(SIZES))
    own = () if where.startswith("overlays/") else ("entrypoint", "activeDeadlineSeconds")
    assert without(base, ("rayClusterSpec", *own)) == without(other, ("rayClusterSpec", *own))


def test_every_container_is_restricted() -> None:
    for pod in infra.pods():
        held = {key: value for key, value in pod.spec["securityContext"].items() if key != "fsGroup"}
        assert held == RESTRICTED_POD, pod.where
        for container in [*pod.spec["containers"], *pod.spec.get("initContainers", [])]:
            assert container["securityContext"] == RESTRICTED_CONTAINER, pod.where
            assert WRITABLE in container["volumeMounts"], pod.where
            assert quantity_set(container["resources"]), pod.where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec), pod.where
    for where, job in infra.ray_jobs().items():
        autoscaler = job["spec"]["rayClusterSpec"].get("autoscalerOptions")
        assert autoscaler is None or autoscaler["securityContext"] == RESTRICTED_CONTAINER, where
    (namespace,) = infra.of_kind("Namespace").values()
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def quantity_set(resources: infra.Object) -> bool:
    """Whether memory is bounded, and nothing else is limited below what is asked for."""
    asked, most = resources["requests"], resources["limits"]
    return "memory" in most and "cpu" in asked and all(infra.quantity(most[key]) >= infra.quantity(asked[key]) for key in most)


def test_only_who_resizes_or_starts_a_cluster_has_a_token() -> None:
    accounts = {
        item["metadata"]["name"]: item.get("automountServiceAccountToken", True) for item in infra.of_kind("ServiceAccount").values()
    }
    for pod in infra.pods():
        account = pod.spec.get("serviceAccountName", "default")
        held = pod.spec.get("automountServiceAccountToken", accounts.get(account, True))
        scaled = pod.component == "ray-head" and not pod.where.startswith("train/")
        assert held == (scaled or pod.component == "starter"), pod.where
        assert account in {"default", *accounts}, pod.where
    (role,) = infra.of_kind("Role").values()
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]


def test_tokens_and_keys_come_from_secrets_and_none_is_written_down() -> None:
    assert not infra.of_kind("Secret")
    for where, job in infra.ray_jobs().items():
        cluster = job["spec"]["rayClusterSpec"]
        assert cluster["authOptions"] == {"mode": "token", "secretName": "catalog-embed-ray-token"}, where
        assert cluster["rayVersion"] == metadata.version("ray"), f"{where}: rayVersion must be the image's, which constraints.txt pins"
    for pod in infra.pods():
        for container in pod.spec["containers"]:
            for item in container.get("env", []):
                secret = any(word in item["name"] for word in ("TOKEN", "SECRET", "PASSWORD", "KEY"))
                assert not (secret and "value" in item), pod.where
            if pod.component in ("ray-head", "ray-worker", "collector"):
                assert {"secretRef": {"name": "catalog-embed-store", "optional": True}} in container["envFrom"], pod.where
            else:
                assert "envFrom" not in container, pod.where


def test_a_node_tells_ray_of_what_its_pod_asks_for() -> None:
    for where, job in infra.ray_jobs().items():
        assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["resources"] == {"CPU": "0"}, where
        for group in infra.groups(job):
            (container,) = group["template"]["spec"]["containers"]
            asked = container["resources"]["requests"]
            assert infra.quantity(asked["cpu"]) == float(group["resources"]["CPU"]), where
            assert asked.get("nvidia.com/gpu", "0") == group["resources"].get("GPU", "0"), where
            assert asked.get("nvidia.com/gpu") == container["resources"]["limits"].get("nvidia.com/gpu"), where
            if "embedder" in group["resources"]:
                assert group["resources"]["embedder"] == group["resources"]["GPU"], where


def test_the_object_store_fits_its_memory_and_spilling_its_disk() -> None:
    for where, job in infra.ray_jobs().items():
        for group in (job["spec"]["rayClusterSpec"]["headGroupSpec"], *infra.groups(job)):
            spec = group["template"]["spec"]
            volumes = {item["name"]: item for item in spec["volumes"]}
            limits = spec["containers"][0]["resources"]["limits"]
            shm, tmp = volumes["shm"]["emptyDir"], volumes["tmp"]["emptyDir"]
            assert shm["medium"] == "Memory", where
            assert float(group["rayStartParams"]["object-store-memory"]) < infra.quantity(shm["sizeLimit"]), where
            # Half of the memory is the work's.
            assert infra.quantity(shm["sizeLimit"]) <= infra.quantity(limits["memory"]) / 2, where
            assert infra.quantity(tmp["sizeLimit"]) <= infra.quantity(limits["ephemeral-storage"]), where


def test_ray_s_own_autoscaler_reads_the_groups_as_they_are_meant() -> None:
    # Private, and the only reader of these fields at run time: constraints.txt pins its version.
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive

    for where, job in infra.ray_jobs().items():
        cluster = job["spec"]["rayClusterSpec"]
        types = derive({"metadata": {"name": "shop", "namespace": "shop"}, "spec": copy.deepcopy(cluster)})["available_node_types"]
        assert types["headgroup"]["resources"]["CPU"] == 0, where
        for group in infra.groups(job):
            read = types[group["groupName"]]
            assert (read["min_workers"], read["max_workers"]) == (group["minReplicas"], group["maxReplicas"]), where
            resources = {name: value for name, value in read["resources"].items() if name != "memory"}
            assert resources == {name: float(value) for name, value in group["resources"].items()}, where


@pytest.mark.parametrize("where", [where for where in infra.ray_jobs() if not where.startswith("train/")])
def test_the_actors_of_the_configuration_fill_the_nodes(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = infra.ray_jobs()[where]
    embed = settings_of(job, monkeypatch).embed
    options = PoolOptions(**{item.name: getattr(embed, item.name) for item in fields(PoolOptions) if hasattr(embed, item.name)})
    nodes = nodes_of(job)
    found = pool(nodes, options, parts=10_000)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    assert found.device == "cuda"
    assert found.ahead
    assert found.actors * found.gpus == gpus, "every GPU of the largest cluster has an actor"
    host = infra.group(job, "gpu")["resources"]
    assert found.cpus * float(host["GPU"]) <= float(host["CPU"]), "the actors of a node leave CPUs to its readers"
    assert set(embed.resources) <= set(host), "the custom resource of the actors is one that GPU nodes have"
    assert not set(embed.resources) & set(infra.group(job, "cpu")["resources"])


def test_gpu_nodes_come_when_actors_ask_and_may_be_spot() -> None:
    for where, job in infra.ray_jobs().items():
        gpu = infra.group(job, "gpu")
        keys = {item["key"] for item in gpu["template"]["spec"]["tolerations"]}
        assert "nvidia.com/gpu" in keys, where
        if where.startswith("train/"):
            assert gpu["minReplicas"] == gpu["maxReplicas"], where
            continue
        cluster = job["spec"]["rayClusterSpec"]
        assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]["version"]) == (True, "v2"), where
        assert (gpu["minReplicas"], gpu["replicas"]) == (0, 0), where
        assert "cloud.google.com/gke-spot" in keys, where
        assert 0 < gpu["template"]["spec"]["terminationGracePeriodSeconds"] <= 30, where
        assert "tolerations" not in cluster["headGroupSpec"]["template"]["spec"], f"{where}: a lost head is a lost run"


def test_deadlines_end_from_the_inside_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cron = infra.nightly()
    outer = cron["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    for where, job in infra.ray_jobs().items():
        spec = job["spec"]
        assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"], where
        wait = settings_of(job, monkeypatch).ray.wait
        assert wait.total_seconds() < spec["activeDeadlineSeconds"], where
        if "nightly-rayjob" in where:
            assert spec["activeDeadlineSeconds"] < outer < 24 * 3600, where
        assert spec["backoffLimit"] == 0, where
        assert spec["shutdownAfterJobFinishes"], where


def test_the_cron_job_forbids_overlap_and_does_not_repeat_a_failed_night() -> None:
    cron = infra.nightly()
    spec = cron["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] > 100, "below, a controller that looks every ten seconds may miss the tick"
    assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (3, 7)
    rules = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["action"] == "FailJob"
    assert rules[0]["onExitCodes"]["values"] == [1, 2]


def test_the_collection_may_delete_alone_and_never_overlaps() -> None:
    (gc,) = (item for where, item in infra.of_kind("CronJob").items() if where.startswith("gc/"))
    assert gc["spec"]["concurrencyPolicy"] == "Forbid"
    pod = gc["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    mine = [other.where for other in infra.pods() if other.spec.get("serviceAccountName") == pod["serviceAccountName"]]
    assert mine == ["gc/gc.yaml: CronJob catalog-embed-gc"]
    context = infra.parse(pod["containers"][0]["args"])
    assert (context.info_name, context.params["apply_it"]) == ("gc", True)


def test_commands_of_the_manifests_parse() -> None:
    for where, job in infra.ray_jobs().items():
        entrypoint = job["spec"]["entrypoint"]
        assert entrypoint.startswith(ENTRYPOINT), where
        context = infra.parse(shlex.split(entrypoint)[1:])
        assert context.params["ray_address"] == "auto", where
        with pytest.raises(click.UsageError):
            infra.parse([*shlex.split(entrypoint)[1:], "--no-such-option"])


def test_the_head_has_the_configuration_where_the_command_looks() -> None:
    for where, job in infra.ray_jobs().items():
        spec = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert {"name": "config", "mountPath": "/etc/catalog-embed", "readOnly": True} in spec["containers"][0]["volumeMounts"], where
        assert {"name": "config", "configMap": {"name": "catalog-embed-config"}} in spec["volumes"], where
    made = {
        item["name"]: item["files"]
        for item in yaml.safe_load((infra.KUBERAY / "base" / "kustomization.yaml").read_text())["configMapGenerator"]
    }
    assert made == {"catalog-embed-config": ["catalog-embed.yaml"], "catalog-embed-nightly": ["nightly-rayjob.yaml", "start-and-wait.sh"]}
