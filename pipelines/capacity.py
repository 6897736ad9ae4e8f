"""Room on a cluster: asked for, waited for, and noticed when it goes. A cluster that grows by itself hears of what is wanted.

What is asked for is a placement group of the shape of an actor: the autoscaler sees it as demand, it is granted only where
an actor would start, also when others hold the machines now, and it goes with the process that asked. (A task of that
shape would do, but for its end: in Ray 2.60 `ray.cancel` of a task that is just being answered aborts the process.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
import ray.data
import ray.exceptions
import ray.util

from pipelines.errors import EmbedError
from pipelines.pool import NoRoom, Pool, PoolOptions, pool

TELL_EVERY_S = 30.0

# A worker process starts in about this time; who waits no longer is told nothing.
_QUIET_S = 3.0
_LOOK_EVERY_S = 1.0
# An actor starts again in a few seconds where there is room for it.
_RESTART_S = 10.0
# A group cannot be of nothing.
_SLIVER = 0.001
_MOST_SHOWN = 8
# Resources that Ray names beside those that people ask for.
_INNER = ("node:", "memory", "object_store_memory", "accelerator_type:")


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """What is wanted of the cluster, what is there, and for how long this has been so."""

    wanted: str
    there: str
    waited_s: int
    limit_s: int

    @property
    def facts(self) -> Mapping[str, Any]:
        """The fields of an event."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for room, and who hears of it; `lost` hears why work begins again that a node took along."""

    limit_s: float
    tell: Callable[[Waiting], object]
    lost: Callable[[str], object] = str


def nodes() -> list[Mapping[str, float]]:
    """Return the resources of every node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def alive() -> frozenset[str]:
    """Return the ids of the nodes that are alive."""
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def fitted_pool(options: PoolOptions, *, parts: int, patience: Patience | None) -> Pool:
    """Fit actors to the nodes there are. With patience, wait until one can start; without, refuse at once."""
    if patience is None:
        return pool(nodes(), options, parts=parts)
    found: Pool | None = None

    def wanted() -> tuple[Mapping[str, float], bool]:
        nonlocal found
        try:
            found = pool(nodes(), options, parts=parts)
        except NoRoom as error:
            return error.wanted, False
        return found.wanted, True

    wait_for(wanted, patience)
    assert found is not None, "what was granted was planned"
    return found


def wait_for(wanted: Callable[[], tuple[Mapping[str, float], bool]], patience: Patience) -> None:
    """Come back when the cluster has granted what is wanted, and the caller's rule can use it."""
    begun = time.monotonic()
    told = begun - TELL_EVERY_S + _QUIET_S
    shape: Mapping[str, float] | None = None
    asked: Any = None
    try:
        while True:
            shape_now, usable = wanted()
            if asked is None or shape_now != shape:
                _take_back(asked)
                shape, asked = shape_now, _ask(shape_now)
            granted = _granted(asked)
            if granted and usable:
                return
            if granted:
                # Room that the rule cannot use yet: the list of nodes is a moment behind.
                time.sleep(_LOOK_EVERY_S)
            now = time.monotonic()
            if now - begun >= patience.limit_s:
                raise EmbedError(
                    f"no room came up in {patience.limit_s:g} s: wanted is {shown(shape_now)}, and there is {shown_nodes(nodes())}. "
                    "Add nodes, ask for less, or raise `ray: wait`; run again to resume."
                )
            if now - told >= TELL_EVERY_S:
                told = now
                there = shown_nodes(nodes())
                patience.tell(Waiting(wanted=shown(shape_now), there=there, waited_s=round(now - begun), limit_s=round(patience.limit_s)))
    finally:
        _take_back(asked)


def _ask(shape: Mapping[str, float]) -> Any:
    return ray.util.placement_group([{name: each for name, each in shape.items() if each} or {"CPU": _SLIVER}])


def _granted(asked: Any) -> bool:
    # Whole seconds: Ray takes no others.
    return bool(asked.wait(timeout_seconds=1))


def _take_back(asked: Any) -> None:
    if asked is not None:
        ray.util.remove_placement_group(asked)


def shown(resources: Mapping[str, float]) -> str:
    """Name resources for a person: `2 CPU + 1 embedder`."""
    return " + ".join(f"{each:g} {name}" for name, each in sorted(resources.items()) if each and not name.startswith(_INNER)) or "nothing"


def shown_nodes(found: Sequence[Mapping[str, float]]) -> str:
    """Name what each node has, the first few of them."""
    more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    return ", ".join(sorted(f"[{shown(node)}]" for node in found)[:_MOST_SHOWN]) + more or "no node"


class NodeLost(Exception):
    """A node went with more actors than the nodes that are left hold."""


class _Watch:
    """Ends a dataset's execution when a node went that it cannot do without; Ray itself would wait, maybe for ever.

    The actors of that node start again where readers and writers need the last CPU, or behind other actors, or nowhere.
    """

    def __init__(self, options: PoolOptions, parts: int) -> None:
        self._options, self._parts = options, parts
        self._alive, self._looked, self._lost_at = alive(), time.monotonic(), math.inf

    def before_execution_starts(self, executor: Any) -> None:
        """Take note of nothing."""

    def after_execution_succeeds(self, executor: Any) -> None:
        """Take note of nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Take note of nothing."""

    def on_execution_step(self, executor: Any) -> None:
        """Compare the actors with what fits when a node has gone; later, look whether those that it had run again."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked, before, self._alive = now, self._alive, alive()
        pools = [item for op in executor._topology for item in op.get_autoscaling_actor_pools()]  # noqa: SLF001  nothing public counts them
        if not before <= self._alive:
            self._lost_at = now
            there, actors = nodes(), sum(item.num_running_actors() for item in pools)
            try:
                room = pool(there, self._options, parts=self._parts).actors
            except NoRoom:
                room = 0
            if room < actors:
                raise NodeLost(f"{actors} actors ran, and {shown_nodes(there)} hold {room}")
        elif now - self._lost_at > _RESTART_S and any(item.num_restarting_actors() for item in pools):
            raise NodeLost(f"an actor of a node that went found no other in {_RESTART_S:g} s")


@contextmanager
def watched(options: PoolOptions, *, parts: int) -> Iterator[None]:
    """Let datasets that are made in this block end with `NodeLost` when a node goes that they cannot do without."""
    context = ray.data.DataContext.get_current()
    before = list(context.custom_execution_callback_classes)
    context.custom_execution_callback_classes = [*before, partial(_Watch, options, parts)]
    try:
        yield
    finally:
        context.custom_execution_callback_classes = before


def node_went(error: BaseException, *, before: frozenset[str]) -> bool:
    """Tell the end of a node from other errors; `before` are those that were alive when the work began."""
    cause: BaseException | None = error
    gone = bool(before - alive())
    while cause is not None:
        if isinstance(cause, NodeLost):
            return True
        if gone and isinstance(cause, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError | ray.exceptions.ObjectLostError):
            return True
        inner = getattr(cause, "cause", None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__ or cause.__context__
    return False
