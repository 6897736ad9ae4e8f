"""The pool of actors: a table of imagined clusters, and what each gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipelines.errors import InputError
from pipelines.pool import NoRoom, Pool, PoolOptions, pool

Node = Mapping[str, float]


def node(cpus: float, gpus: float = 0) -> Node:
    """Return a node's resources, with the others that Ray names beside them."""
    return {"CPU": cpus, "memory": 1e11, "node:10.0.0.1": 1.0, **({"GPU": gpus, "accelerator_type:H100": 1.0} if gpus else {})}


# Nodes, what is asked for, parts, and what comes: actors, CPUs and GPUs of each, threads, device, ids made ahead.
CLUSTERS: Mapping[str, tuple[Sequence[Node], Mapping[str, Any], int, tuple[int, float, float, int, str, bool]]] = {
    "2 cores": ([node(2)], {}, 9, (1, 1.0, 0.0, 2, "auto", False)),
    "1 core": ([node(1)], {}, 9, (1, 0.0, 0.0, 1, "auto", False)),
    "64 cores": ([node(64)], {}, 99, (1, 63.0, 0.0, 64, "auto", False)),
    "64 cores, 4 actors": ([node(64)], {"actors": 4}, 99, (4, 15.0, 0.0, 16, "auto", False)),
    "2 cores, 4 actors": ([node(2)], {"actors": 4}, 99, (4, 0.25, 0.0, 1, "auto", False)),
    "3 nodes, a head without cores": ([node(0), node(8), node(16), node(8)], {}, 99, (3, 7.0, 0.0, 8, "auto", False)),
    "64 cores, ids ahead": ([node(64)], {"tokenize": "ahead"}, 99, (1, 63.0, 0.0, 64, "auto", True)),
    "1 GPU": ([node(16, 1)], {}, 99, (1, 2.0, 1.0, 2, "cuda", True)),
    "1 GPU, the actor tokenises": ([node(16, 1)], {"tokenize": "actor"}, 99, (1, 8.0, 1.0, 8, "cuda", False)),
    "1 GPU, 1 core": ([node(1, 1)], {}, 99, (1, 0.0, 1.0, 1, "cuda", True)),
    "1 GPU, 2 cores": ([node(2, 1)], {}, 99, (1, 1.0, 1.0, 1, "cuda", True)),
    "8 GPUs": ([node(96, 8)], {}, 99, (8, 2.0, 1.0, 2, "cuda", True)),
    "8 GPUs, the actors tokenise": ([node(96, 8)], {"tokenize": "actor"}, 99, (8, 6.0, 1.0, 6, "cuda", False)),
    "8 GPUs, 8 cores": ([node(8, 8)], {}, 99, (8, 0.5, 1.0, 1, "cuda", True)),
    "8 GPUs, threads": ([node(96, 8)], {"threads": 3}, 99, (8, 2.0, 1.0, 3, "cuda", True)),
    "2 nodes with 4 GPUs": ([node(48, 4), node(48, 4)], {}, 99, (8, 2.0, 1.0, 2, "cuda", True)),
    "GPUs beside a node of cores": ([node(128), node(16, 4)], {}, 99, (4, 2.0, 1.0, 2, "cuda", True)),
    "unequal nodes": ([node(8, 4), node(64, 2)], {}, 99, (6, 1.0, 1.0, 1, "cuda", True)),
    "2 actors a GPU": ([node(16, 1)], {"gpus_per_actor": 0.5}, 99, (2, 2.0, 0.5, 2, "cuda", True)),
    "5 actors a GPU": ([node(40, 2)], {"gpus_per_actor": 0.2}, 99, (10, 2.0, 0.2, 2, "cuda", True)),
    "shares that leave a rest": ([node(8, 2), node(8, 2)], {"gpus_per_actor": 0.6}, 99, (4, 2.0, 0.6, 2, "cuda", True)),
    "2 GPUs an actor": ([node(16, 3), node(16, 3)], {"gpus_per_actor": 2.0}, 99, (2, 2.0, 2.0, 2, "cuda", True)),
    "half a GPU": ([node(16, 0.5)], {}, 99, (1, 2.0, 0.5, 2, "cuda", True)),
    "fewer actors than GPUs": ([node(96, 8)], {"actors": 3}, 99, (3, 2.0, 1.0, 2, "cuda", True)),
    "more GPUs than parts": ([node(8, 8)], {}, 2, (2, 2.0, 1.0, 2, "cuda", True)),
    "more actors than parts": ([node(64)], {"actors": 16}, 3, (3, 21.0, 0.0, 21, "auto", False)),
    "GPUs left alone": ([node(16, 1)], {"gpus_per_actor": 0.0}, 99, (1, 15.0, 0.0, 16, "cpu", False)),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_pool_of_a_cluster(name: str) -> None:
    nodes, asked, parts, (actors, cpus, gpus, threads, device, ahead) = CLUSTERS[name]
    found = pool(nodes, PoolOptions(**asked), parts=parts)
    assert found == Pool(actors=actors, most=actors, cpus=cpus, gpus=gpus, threads=threads, device=device, ahead=ahead)
    # Without a whole CPU for them, the tasks that feed the actors would wait for ever.
    assert any(item["CPU"] - cpus * actors >= 1 for item in nodes) or sum(item["CPU"] for item in nodes) - cpus * actors >= len(nodes)
    for item in nodes if gpus else []:
        fit = item.get("GPU", 0) // gpus if gpus >= 1 else max(1, item.get("GPU", 0)) * (1.001 // gpus)
        assert cpus * min(actors, fit) <= item["CPU"] / 2


@pytest.mark.parametrize(
    ("nodes", "asked", "room"),
    [
        ([node(64)], {"gpus_per_actor": 1.0}, "1 actors with 1 GPUs are more than the 0 GPUs of the nodes hold, which is 0"),
        ([node(16, 1)], {"actors": 3, "gpus_per_actor": 0.5}, "the 1 GPUs of the nodes hold, which is 2"),
        # Four actors want no more than the three GPUs of the cluster, and yet do not fit.
        ([node(16, 1), node(16, 2)], {"actors": 4, "gpus_per_actor": 0.75}, r"the 1 \+ 2 GPUs of the nodes hold, which is 3"),
    ],
)
def test_actors_that_no_node_has_room_for_are_refused(nodes: Sequence[Node], asked: Mapping[str, Any], room: str) -> None:
    with pytest.raises(InputError, match=room):
        pool(nodes, PoolOptions(**asked), parts=9)


def embedder(cpus: float, count: float = 1, gpus: float = 0) -> Node:
    """Return a node that was given a resource of that name."""
    return {**node(cpus, gpus), "embedder": count}


# Nodes, what is asked for, and what comes: actors, the most there may be, CPUs and GPUs of each, threads.
NAMED: Mapping[str, tuple[Sequence[Node], Mapping[str, Any], tuple[int, int, float, float, int]]] = {
    "one node of three has it": ([node(0), node(8), embedder(4)], {}, (1, 1, 3.0, 0.0, 4)),
    "two of them side by side": ([node(8), embedder(8, 2)], {}, (2, 2, 3.0, 0.0, 4)),
    "a node without a core for the actor": ([node(8), embedder(1)], {}, (1, 1, 0.0, 0.0, 1)),
    "fewer actors than there is room for": ([embedder(4), embedder(4)], {"actors": 1}, (1, 1, 3.0, 0.0, 4)),
    "GPUs elsewhere are no business of it": ([node(64, 8), embedder(4, 1)], {}, (1, 1, 3.0, 0.0, 4)),
    "GPUs where it is": ([node(64, 8), embedder(16, 1, 2)], {}, (1, 1, 2.0, 1.0, 2)),
    "more may come": ([embedder(4), node(2)], {"growing": True}, (1, 99, 3.0, 0.0, 4)),
    "more may come, up to a number": ([embedder(4), node(2)], {"growing": True, "actors": 3}, (1, 3, 3.0, 0.0, 4)),
}


@pytest.mark.parametrize("name", NAMED)
def test_only_nodes_with_the_named_resource_hold_actors(name: str) -> None:
    nodes, asked, (actors, most, cpus, gpus, threads) = NAMED[name]
    found = pool(nodes, PoolOptions(resources={"embedder": 1.0}, **asked), parts=99)
    assert (found.actors, found.most, found.cpus, found.gpus, found.threads) == (actors, most, cpus, gpus, threads)
    assert found.wanted == {"CPU": cpus, "GPU": gpus, "embedder": 1.0}


@pytest.mark.parametrize(
    ("nodes", "asked", "most"),
    [
        ([node(8)], {}, 99),
        ([node(8)], {"actors": 2}, 2),
        ([node(16, 1)], {}, 99),
        ([node(16, 1)], {"actors": 3}, 3),
        # An actor that takes no whole CPU would find room on a node that has an actor.
        ([node(1)], {}, 1),
    ],
)
def test_a_cluster_that_grows_begins_with_what_fits_and_leaves_room_for_more(
    nodes: Sequence[Node], asked: Mapping[str, Any], most: int
) -> None:
    found = pool(nodes, PoolOptions(growing=True, **asked), parts=99)
    assert found.most == most
    assert pool(nodes, PoolOptions(growing=True, **asked), parts=1).most == 1
    if not asked.get("actors"):
        assert found.actors == pool(nodes, PoolOptions(**asked), parts=99).actors


@pytest.mark.parametrize(
    ("nodes", "asked", "wanted"),
    [
        ([], {}, {"CPU": 1.0}),
        ([node(0)], {}, {"CPU": 1.0}),
        ([node(8)], {"gpus_per_actor": 1.0}, {"CPU": 1.0, "GPU": 1.0}),
        ([node(8)], {"resources": {"embedder": 2.0}}, {"CPU": 1.0, "embedder": 2.0}),
        ([embedder(8)], {"resources": {"embedder": 2.0}}, {"CPU": 1.0, "embedder": 2.0}),
    ],
)
def test_a_cluster_without_room_for_one_actor_says_what_one_takes(
    nodes: Sequence[Node], asked: Mapping[str, Any], wanted: Mapping[str, float]
) -> None:
    with pytest.raises(NoRoom) as refused:
        pool(nodes, PoolOptions(growing=True, **asked), parts=9)
    assert refused.value.wanted == wanted


def test_more_named_resources_than_there_are_are_refused_where_none_can_come() -> None:
    with pytest.raises(
        InputError, match=r"2 actors with 1 embedder are more than the .* of the nodes hold, which is 1\. Lower `actors` or `resources`"
    ):
        pool([embedder(8)], PoolOptions(resources={"embedder": 1.0}, actors=2), parts=9)
