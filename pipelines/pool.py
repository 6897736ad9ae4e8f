"""How many actors hold a tower, and what each has: a rule over the nodes of a cluster.

Tasks feed the actors and write what they give, so CPUs stay theirs: one on every node, and half of a node beside GPUs,
where a core tokenises some ten thousand texts a second and a GPU takes more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from pipelines.errors import InputError

Tokenize = Literal["auto", "ahead", "actor"]

# An actor that gets ids packs, copies and launches; more cores are better spent on tokenising.
_CPUS_WITH_IDS = 2.0
# 1 / 0.2 is 4.999... in floats.
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """What the caller asks for. What is None, or `auto`, follows the cluster."""

    actors: int | None = None
    gpus_per_actor: float | None = None
    threads: int | None = None
    tokenize: Tokenize = "auto"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How many actors there are, what each has, and whether tasks tokenise ahead of them."""

    actors: int
    cpus: float
    gpus: float
    threads: int
    device: str
    ahead: bool


def pool(nodes: Sequence[Mapping[str, float]], options: PoolOptions, *, parts: int) -> Pool:
    """Fit actors to nodes, each given by its resources as Ray names them: one for a GPU, or one for a machine without."""
    gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    each = min(gpus, 1.0) if options.gpus_per_actor is None else options.gpus_per_actor
    return _on_gpus(nodes, options, each, parts) if each else _on_cpus(nodes, options, parts)


def _on_gpus(nodes: Sequence[Mapping[str, float]], options: PoolOptions, each: float, parts: int) -> Pool:
    rooms = [(_room(node.get("GPU", 0.0), each), node.get("CPU", 0.0)) for node in nodes]
    room = sum(fit for fit, _ in rooms)
    wanted = options.actors or max(1, room)
    if wanted > room:
        gpus = " + ".join(f"{node.get('GPU', 0.0):g}" for node in nodes) or "0"
        raise InputError(
            f"{wanted} actors with {each:g} GPUs are more than the {gpus} GPUs of the nodes hold, which is {room}. "
            "Lower `actors` or `gpus_per_actor`."
        )
    actors = max(1, min(wanted, parts))
    ahead = options.tokenize != "actor"
    # Any node may get as many actors as fit, so the fullest of the smallest decides.
    share = min(min(cores / 2, cores - 1) / min(fit, actors) for fit, cores in rooms if fit)
    cpus = _whole(min(share, _CPUS_WITH_IDS) if ahead else share)
    threads = options.threads or max(1, int(cpus))
    return Pool(actors=actors, cpus=cpus, gpus=each, threads=threads, device="cuda", ahead=ahead)


def _on_cpus(nodes: Sequence[Mapping[str, float]], options: PoolOptions, parts: int) -> Pool:
    """Give an actor all cores of its machine but one: the readers need little beside it."""
    cores = [cpus for node in nodes if (cpus := node.get("CPU", 0.0)) >= 1] or [1.0]
    actors = max(1, min(options.actors or len(cores), parts))
    a_node = ceil(actors / len(cores))
    threads = options.threads or max(1, int(min(cores) / a_node))
    device = "cpu" if any(node.get("GPU") for node in nodes) else "auto"
    cpus = _whole((min(cores) - 1) / a_node)
    return Pool(actors=actors, cpus=cpus, gpus=0.0, threads=threads, device=device, ahead=options.tokenize == "ahead")


def _room(gpus: float, each: float) -> int:
    """Return how many actors fit on the GPUs of one node; a share of a GPU never spans two."""
    if each >= 1:
        return int(gpus / each + _EPSILON)
    return int(gpus) * int(1 / each + _EPSILON) + int((gpus - int(gpus)) / each + _EPSILON)


def _whole(cpus: float) -> float:
    """Round down to what Ray counts in: whole CPUs, or hundredths of one."""
    return float(int(cpus)) if cpus >= 1 else max(0.0, int(cpus * 100) / 100)
