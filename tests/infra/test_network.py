"""The network policies, read as a network would: who reaches whom, and where the world begins."""

from __future__ import annotations

from typing import Any

from tests.infra import manifests as infra


def matches(selector: infra.Object, labels: dict[str, str]) -> bool:
    """Whether a label selector chooses a pod with these labels."""
    wanted = selector.get("matchLabels", {})
    asked = selector.get("matchExpressions", [])
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(item["key"]) in item["values"] for item in asked
    )


def ports_open(source: str, target: str) -> set[Any]:
    """The ports of pods of one kind that policies let pods of another kind reach; `any` where all are open."""
    policies = infra.of_kind("NetworkPolicy").values()

    def side(own: str, other: str, direction: str, peers: str) -> set[Any]:
        rules = [
            rule
            for policy in policies
            if matches(policy["spec"]["podSelector"], {"app.kubernetes.io/component": own})
            for rule in policy["spec"].get(direction, [])
        ]
        found: set[Any] = set()
        for rule in rules:
            for peer in rule[peers]:
                foreign = other == "kuberay-operator"
                inside = "podSelector" in peer and ("namespaceSelector" in peer) == foreign
                if inside and matches(peer["podSelector"], {"app.kubernetes.io/component": other}):
                    found |= {port["port"] for port in rule["ports"]} if "ports" in rule else {"any"}
        return found

    into = side(target, source, "ingress", "from")
    if source == "kuberay-operator":
        return into
    out = side(source, target, "egress", "to")
    return into if "any" in out else out if "any" in into else into & out


def test_network_policies_open_what_a_run_needs_and_no_more() -> None:
    (deny,) = [
        item for item in infra.of_kind("NetworkPolicy").values() if item["spec"]["podSelector"] == {} and "egress" not in item["spec"]
    ]
    assert deny["spec"]["policyTypes"] == ["Ingress", "Egress"]
    components = {pod.component for pod in infra.pods()}
    assert components == {"collector", "starter", "submitter", "ray-head", "ray-worker"}
    opened = {(source, target): ports_open(source, target) for source in {*components, "kuberay-operator"} for target in components}
    assert {pair: ports for pair, ports in opened.items() if ports} == {
        ("ray-head", "ray-head"): {"any"},
        ("ray-head", "ray-worker"): {"any"},
        ("ray-worker", "ray-head"): {"any"},
        ("ray-worker", "ray-worker"): {"any"},
        ("submitter", "ray-head"): {8265},
        ("kuberay-operator", "ray-head"): {8265},
    }


def test_the_world_is_reached_by_https_only() -> None:
    reached: dict[str, set[int]] = {}
    for policy in infra.of_kind("NetworkPolicy").values():
        for rule in policy["spec"].get("egress", []):
            if any("ipBlock" in peer for peer in rule["to"]):
                for component in ("starter", "submitter", "ray-head", "ray-worker"):
                    if matches(policy["spec"]["podSelector"], {"app.kubernetes.io/component": component}):
                        reached.setdefault(component, set()).update(port["port"] for port in rule["ports"])
    assert reached == {"starter": {443, 6443}, "ray-head": {443, 6443}, "ray-worker": {443}}


def test_other_namespaces_are_met_for_names_and_metrics_only() -> None:
    met = {
        (policy["metadata"]["name"], direction, next(iter(peer["namespaceSelector"]["matchLabels"].values())), port["port"])
        for policy in infra.of_kind("NetworkPolicy").values()
        for direction, peers in (("ingress", "from"), ("egress", "to"))
        for rule in policy["spec"].get(direction, [])
        for peer in rule[peers]
        for port in rule.get("ports", [])
        if peer.get("namespaceSelector", {}).get("matchLabels")
    }
    assert met == {
        ("catalog-embed-dns", "egress", "kube-system", 53),
        *(("catalog-embed-prometheus", "ingress", "monitoring", port) for port in (8080, 44217, 44227)),
        ("catalog-embed-pushgateway", "egress", "monitoring", 9091),
        ("catalog-embed-collector", "egress", "monitoring", 9091),
    }
