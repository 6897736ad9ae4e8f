"""How many actors hold a tower, and what each has: a rule over the nodes of a cluster.

Tasks feed the actors and write what they give, so CPUs stay theirs: one on every node, and half of a node beside GPUs,
where a core tokenises some ten thousand texts a second and a GPU takes more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

from pipelines.errors import InputError

Tokenize = Literal["auto", "ahead", "actor"]

# An actor that gets ids packs, copies and launches; more cores are better spent on tokenising.
_CPUS_WITH_IDS = 2.0
# 1 / 0.2 is 4.999... in floats.
_EPSILON = 1e-6
_ANY = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """What the caller asks for. What is None, or `auto`, follows the cluster."""

    actors: int | None = None
    # However much room there is, no more actors than this.
    at_most: int | None = None
    gpus_per_actor: float | None = None
    threads: int | None = None
    tokenize: Tokenize = "auto"
    # Named resources that each actor takes, such as `embedder: 1`: only nodes that have them hold actors.
    resources: Mapping[str, float] = field(default_factory=dict)
    # The cluster may grow: begin with the actors that fit, and leave room for those that come.
    growing: bool = False


class NoRoom(InputError):
    """No node holds an actor as it is asked for; `wanted` is what one takes."""

    def __init__(self, message: str, wanted: Mapping[str, float]) -> None:
        super().__init__(message)
        self.wanted = wanted


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How many actors there are, what each has, and whether tasks tokenise ahead of them."""

    actors: int
    # How many there may be when nodes join.
    most: int
    cpus: float
    gpus: float
    threads: int
    device: str
    ahead: bool
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def wanted(self) -> Mapping[str, float]:
        """What one actor takes of its node."""
        return {"CPU": self.cpus, "GPU": self.gpus, **self.resources}


def pool(nodes: Sequence[Mapping[str, float]], options: PoolOptions, *, parts: int) -> Pool:
    """Fit actors to nodes, each given by its resources as Ray names them: one for a GPU, or one for a machine without."""
    held = [node for node in nodes if all(node.get(name, 0.0) >= each for name, each in options.resources.items())]
    gpus = max((node.get("GPU", 0.0) for node in held), default=0.0)
    each = min(gpus, 1.0) if options.gpus_per_actor is None else options.gpus_per_actor
    if each:
        found = _on_gpus(held, options, each, parts)
    elif options.resources:
        found = _on_named(held, options, parts)
    else:
        found = _on_cpus(held, options, parts)
    # Without any whole CPU or GPU of its own an actor could start wherever another is, for ever.
    grows = options.growing and (found.gpus or found.cpus >= 1 or options.resources)
    most = max(found.actors, min(parts, options.actors or parts)) if grows else found.most
    limit = options.at_most or _ANY
    return replace(found, actors=min(found.actors, limit), most=min(most, limit))


def _on_gpus(nodes: Sequence[Mapping[str, float]], options: PoolOptions, each: float, parts: int) -> Pool:
    rooms = [(min(_room(node.get("GPU", 0.0), each), _named_room(node, options)), node.get("CPU", 0.0)) for node in nodes]
    room = sum(fit for fit, _ in rooms)
    gpus = " + ".join(f"{node.get('GPU', 0.0):g}" for node in nodes) or "0"
    actors = max(1, min(_fitting(room, options, {"CPU": 1.0, "GPU": each}, f"{each:g} GPUs", f"{gpus} GPUs"), parts))
    ahead = options.tokenize != "actor"
    # Any node may get as many actors as fit, so the fullest of the smallest decides.
    share = min(min(cores / 2, cores - 1) / min(fit, actors) for fit, cores in rooms if fit)
    cpus = _whole(min(share, _CPUS_WITH_IDS) if ahead else share)
    threads = options.threads or max(1, int(cpus))
    return Pool(actors=actors, most=actors, cpus=cpus, gpus=each, threads=threads, device="cuda", ahead=ahead, resources=options.resources)


def _on_named(nodes: Sequence[Mapping[str, float]], options: PoolOptions, parts: int) -> Pool:
    """Put actors where the named resources are, with the cores there but one."""
    rooms = [(_named_room(node, options), node.get("CPU", 0.0)) for node in nodes]
    named = " and ".join(f"{each:g} {name}" for name, each in options.resources.items())
    wanted = _fitting(
        sum(fit for fit, _ in rooms), options, {"CPU": 1.0}, named, " + ".join(f"{fit} times that" for fit, _ in rooms) or "nothing"
    )
    actors = max(1, min(wanted, parts))
    fullest = [(min(fit, actors), cores) for fit, cores in rooms if fit]
    cpus = _whole(min((cores - 1) / fit for fit, cores in fullest))
    threads = options.threads or max(1, int(min(cores / fit for fit, cores in fullest)))
    device = "cpu" if any(node.get("GPU") for node in nodes) else "auto"
    ahead = options.tokenize == "ahead"
    return Pool(actors=actors, most=actors, cpus=cpus, gpus=0.0, threads=threads, device=device, ahead=ahead, resources=options.resources)


def _fitting(room: int, options: PoolOptions, wanted: Mapping[str, float], each: str, there: str) -> int:
    """Return how many actors begin: as many as asked for, or, where more room may come, those that fit."""
    asked = options.actors or max(1, room)
    if asked <= room:
        return asked
    if options.growing and room:
        return room
    raise NoRoom(
        f"{asked} actors with {each} are more than the {there} of the nodes hold, which is {room}. "
        f"Lower `actors` or {'`resources`' if options.resources else '`gpus_per_actor`'}.",
        wanted={**wanted, **options.resources},
    )


def _on_cpus(nodes: Sequence[Mapping[str, float]], options: PoolOptions, parts: int) -> Pool:
    """Give an actor all cores of its machine but one: the readers need little beside it."""
    cores = [cpus for node in nodes if (cpus := node.get("CPU", 0.0)) >= 1]
    if not cores and options.growing:
        raise NoRoom("no node has a CPU yet. Add nodes.", wanted={"CPU": 1.0})
    cores = cores or [1.0]
    actors = max(1, min(options.actors or len(cores), parts))
    a_node = ceil(actors / len(cores))
    threads = options.threads or max(1, int(min(cores) / a_node))
    device = "cpu" if any(node.get("GPU") for node in nodes) else "auto"
    cpus = _whole((min(cores) - 1) / a_node)
    return Pool(actors=actors, most=actors, cpus=cpus, gpus=0.0, threads=threads, device=device, ahead=options.tokenize == "ahead")


def _named_room(node: Mapping[str, float], options: PoolOptions) -> int:
    """Return how many actors the named resources of a node are enough for."""
    return min((int(node.get(name, 0.0) / each + _EPSILON) for name, each in options.resources.items()), default=_ANY)


def _room(gpus: float, each: float) -> int:
    """Return how many actors fit on the GPUs of one node; a share of a GPU never spans two."""
    if each >= 1:
        return int(gpus / each + _EPSILON)
    return int(gpus) * int(1 / each + _EPSILON) + int((gpus - int(gpus)) / each + _EPSILON)


def _whole(cpus: float) -> float:
    """Round down to what Ray counts in: whole CPUs, or hundredths of one."""
    return float(int(cpus)) if cpus >= 1 else max(0.0, int(cpus * 100) / 100)
