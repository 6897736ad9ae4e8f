"""The embed stage on Ray Data: parts to make go in, durable parts of the vector log come out, as they finish.

Tasks read the planned rows again and render them, and tokenise ahead where the actors have GPUs; actors hold the tower,
tasks write. Parts without a forward pass need no actor, and start no tower. A part that is there already is verified and
passed on. Never connects to Ray by itself.
"""

from __future__ import annotations

import gc
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from math import ceil
from typing import Any

import ray
import ray.data
import ray.exceptions
import ray.util.annotations

from encoder.errors import TowerError
from pipelines.capacity import Patience, alive, fitted_pool, node_went, watched
from pipelines.errors import CatalogEmbedError, EmbedError
from pipelines.parts import PartDone, PartWork
from pipelines.pool import Pool, PoolOptions
from pipelines.stages import POSTPONED, EmbedJob, Maker, Read, Tower, Write, make, make_tokenizer, sent
from pipelines.workers import own_errors, spread

__all__ = ["EmbedJob", "PartDone", "PartWork", "run_parts"]

_RETRIES = 3
# So few rows without a forward pass are made faster than a worker starts.
_ROWS_HERE = 4096
# Parts that kill workers are bounded by `careful.MAX_ATTEMPTS`, with a message. These bound what never gets that far.
_MAX_RESTARTS = 100
_MAX_TASK_RETRIES = 60
# One part waits at the actor while another is embedded.
_IN_FLIGHT = 2
# Above this many failing rows, and this share, it is the tower and not the rows.
_MOST_FAILED_ROWS, _MOST_FAILED_RATIO = 100, 0.05
# When nothing at all succeeds, so few are enough.
_ALL_FAILED_ROWS = 10


def run_parts(
    work: Iterable[PartWork], job: EmbedJob, *, tell: Callable[[str], object] = str, patience: Patience | None = None
) -> Iterator[PartDone]:
    """Make every part durable and yield it, in any order: first those without a forward pass, then those with one.

    `work` is consumed once; rows to embed wait in Ray's object store, which spills to disk, the others a few at a time.
    `tell` hears why a job waits whose turn it is not. With `patience` the cluster may grow and shrink, and come to have
    room only later; without, room that is not there is an error.
    """
    maker = Maker(log=job.log, preparer=job.preparer, shards={shard.name: ray.put(shard) for shard in job.shards})
    shared = ray.put(maker)
    waiting: list[Any] = []
    here: list[bytes] = []
    rows, left = 0, _ROWS_HERE

    def others() -> Iterator[tuple[Any, bytes]]:
        nonlocal rows, left
        for item in work:
            if not item.rows.num_rows:
                continue
            if item.kind == "embed":
                waiting.append(ray.put(sent(item)))
                rows += item.rows.num_rows
            elif item.rows.num_rows <= left:
                left -= item.rows.num_rows
                here.append(make(maker, sent(item)))
            else:
                yield shared, sent(item)

    in_flight = max(2, int(ray.cluster_resources().get("CPU", 1)))
    try:
        with own_errors():
            for packed in spread(make, others(), in_flight=in_flight):
                yield PartDone.unpack(packed)
            yield from map(PartDone.unpack, here)
            if waiting:
                yield from _in_turns(waiting, rows, maker, job, tell=tell, patience=patience)
    except Exception as error:  # noqa: BLE001  every error is raised again below
        failure = _own(error)
    else:
        return
    # An error of Ray Data and its actors hold each other, and with them the CPUs that another run waits for.
    failure.__context__ = None
    gc.collect()
    raise failure


def _in_turns(
    waiting: Sequence[Any], rows: int, maker: Maker, job: EmbedJob, *, tell: Callable[[str], object], patience: Patience | None
) -> Iterator[PartDone]:
    """Run the parts that need the tower; while others go first, hand none out and hold no actor.

    When a node goes and the actors no longer fit, begin again with those that do: what is durable stays.
    """
    while waiting:
        if job.turn is not None:
            job.turn.wait(tell)
        before, left = alive(), dict(enumerate(waiting))
        try:
            for index, packed in _embed(waiting, rows, maker, job, patience):
                if packed != POSTPONED:
                    del left[index]
                    yield PartDone.unpack(packed)
        except Exception as error:
            if patience is None or not node_went(error, before=before):
                raise
            patience.lost(f"{len(left)} parts begin again on the nodes that are left: {error}"[:500])
        # What ended holds its actors, and with them the CPUs that the next ones wait for.
        gc.collect()
        waiting = list(left.values())


def _embed(waiting: Sequence[Any], rows: int, maker: Maker, job: EmbedJob, patience: Patience | None) -> Iterator[tuple[int, bytes]]:
    """Run parts through readers, actors and writers; yield the number of each and what became of it."""
    limit = max(_MOST_FAILED_ROWS, ceil(_MOST_FAILED_RATIO * rows))
    asked = {item.name: getattr(job, item.name) for item in fields(PoolOptions)}
    options = PoolOptions(**asked | {"growing": patience is not None})
    plan = fitted_pool(options, parts=len(waiting), patience=patience)
    bare = replace(job, shards=())
    tokenizer = ray.remote(max_retries=_RETRIES)(make_tokenizer).remote(bare) if plan.ahead else None
    plain: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    with warnings.catch_warnings(), watched(options, parts=len(waiting)) if patience else nullcontext():
        # As in `workers.scan`: without the bound on retries a crashing task is retried for ever.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        dataset = (
            ray.data.range(len(waiting), override_num_blocks=len(waiting))
            .map_batches(Read(maker, waiting, job.fingerprint, tokenizer, job.turn), max_retries=_RETRIES, **plain)
            .map_batches(
                Tower,
                fn_constructor_kwargs={"job": bare, "pool": plan, "rows": rows, "limit": limit, "session": secrets.token_hex(8)},
                compute=_strategy(plan),
                num_cpus=plan.cpus,
                num_gpus=plan.gpus,
                resources=plan.resources or None,
                max_restarts=_MAX_RESTARTS,
                max_task_retries=_MAX_TASK_RETRIES,
                **plain,
            )
            .map_batches(Write(maker, waiting), max_retries=_RETRIES, **plain)
        )
    yield from _followed(dataset, limit)


def _strategy(plan: Pool) -> Any:
    """Hold the actors that fit, and where the cluster may grow as many more as it comes to have room for."""
    return ray.data.ActorPoolStrategy(min_size=plan.actors, max_size=plan.most, max_tasks_in_flight_per_actor=_IN_FLIGHT)


def _followed(dataset: Any, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield what became of each part, and give up where it is not single rows that fail."""
    seen = failed = 0
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for index, packed in zip(batch.column("index").to_pylist(), batch.column("done").to_pylist(), strict=True):
            yield index, packed
            if packed == POSTPONED:
                continue
            done = PartDone.unpack(packed)
            seen += done.rows + done.lost.num_rows
            failed += done.lost.num_rows
            if failed > limit:
                raise EmbedError(f"{failed} of {seen} rows cannot be embedded, more than {limit}. {_ADVICE}")
    if failed == seen >= _ALL_FAILED_ROWS:
        raise EmbedError(f"none of {seen} rows can be embedded. {_ADVICE}")


_ADVICE = "So it is not the rows: check the tower with `catalog-embed doctor`, and run again to resume."


def _own(error: Exception) -> Exception:
    """Return the error that the caller shall see."""
    if isinstance(error, CatalogEmbedError):
        return error.with_traceback(None)
    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, "cause", None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__ or cause.__context__
        if isinstance(cause, TowerError):
            return TowerError(str(cause).partition("\nFailed to apply UDF")[0])
    if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
        return EmbedError(f"a worker could not go on ({type(error).__name__}: {str(error)[:200]}). Look at Ray's log; run again to resume.")
    return error
