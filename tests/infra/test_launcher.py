"""infra/ray/cluster.yaml: valid by the schema that Ray's launcher itself uses, closed to others, sized for the example."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.settings import load
from pipelines.pool import PoolOptions, pool
from tests.infra.manifests import INFRA, KUBERAY

LAUNCHER = INFRA / "ray" / "cluster.yaml"


def config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(LAUNCHER.read_text())
    return found


def schema() -> dict[str, Any]:
    """The schema that `ray up` holds a file against; found without loading Ray."""
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    found: dict[str, Any] = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    return found


def judge() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: the launcher's schema is not looked at")
    return jsonschema.Draft7Validator(schema())


def test_the_launcher_s_own_schema_accepts_the_file() -> None:
    assert [error.message for error in judge().iter_errors(config())] == []
    # It lets unknown keys of a provider pass.
    assert set(config()["provider"]) <= set(schema()["properties"]["provider"]["properties"])


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown key": lambda item: item.update(max_worker=3),
    "no provider": lambda item: item.pop("provider"),
    "a share of a resource": lambda item: item["available_node_types"]["gpu"]["resources"].update(embedder=0.5),
    "no node": lambda item: item["available_node_types"]["gpu"].pop("node_config"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_launcher_s_own_schema_refuses_a_broken_file(broken: str) -> None:
    found = copy.deepcopy(config())
    BREAKS[broken](found)
    assert not judge().is_valid(found)


def test_every_process_asks_for_the_token_and_the_dashboard_stays_on_its_machine() -> None:
    found = config()
    starts = [line for name in ("head_start_ray_commands", "worker_start_ray_commands") for line in found[name] if "ray start" in line]
    assert len(starts) == 2
    for line in starts:
        assert "export PATH=~/catalog-embed/bin:$PATH RAY_AUTH_MODE=token; ray start" in line
    assert "~/.ray/auth_token" in found["file_mounts"], "where Ray looks for a token by itself"
    assert "chmod 600 ~/.ray/auth_token" in found["setup_commands"]
    (head,) = [line for line in found["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert found["provider"]["use_internal_ips"] is True


def test_the_nodes_hold_the_actors_of_the_example() -> None:
    types = config()["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert sum(item.get("max_workers", 0) for name, item in types.items() if name != "head") == config()["max_workers"]
    embed = load(KUBERAY / "base" / "catalog-embed.yaml").embed
    nodes = [item["resources"] for item in types.values()]
    options = PoolOptions(**{item.name: getattr(embed, item.name) for item in fields(PoolOptions) if hasattr(embed, item.name)})
    found = pool(nodes, options, parts=100)
    assert (found.device, found.actors) == ("cuda", embed.actors)
    assert set(embed.resources) <= set(types["gpu"]["resources"])


def test_the_file_s_own_commands_name_files_that_exist() -> None:
    named = re.findall(r"infra/ray/\S+\.yaml", LAUNCHER.read_text())
    assert named
    assert {INFRA.parent / name for name in named} == {LAUNCHER}
