"""The one face that reading and planning show to Ray: shards through a function, and arguments through a function.

Order is not kept, and nothing above this module may depend on it. A task that dies with its worker is tried again a
bounded number of times; an error that the code raised on purpose comes back as itself, without Ray's wrapping.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.data
import ray.util.annotations

from pipelines.contracts import Shard
from pipelines.errors import CatalogEmbedError

_RETRIES = 3


class Prepare(Protocol):
    """What is done to every batch of a shard, on a worker. Picklable."""

    def __call__(self, batch: pa.RecordBatch, *, shard: str, first_row: int) -> pa.Table:
        """Return what shall travel back."""
        ...


@dataclass(frozen=True)
class _ReadShards:
    """Opens the shards whose numbers a block holds and prepares their batches."""

    shards: Sequence[Any]
    prepare: Prepare

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        for number in numbers.column(0).to_pylist():
            shard: Shard = ray.get(self.shards[number])
            first_row = 0
            for batch in shard.open():
                yield self.prepare(batch, shard=shard.name, first_row=first_row)
                first_row += batch.num_rows


def scan(shards: Sequence[Shard], prepare: Prepare) -> Iterator[pa.Table]:
    """Read every shard on the cluster and stream what `prepare` made of its batches, as they finish."""
    if not shards:
        return
    # References, so that a task fetches the shards it reads and no others: one over a table in memory carries its rows.
    read = _ReadShards([ray.put(shard) for shard in shards], prepare)
    with warnings.catch_warnings():
        # The named parameters that Ray recommends instead lack this one; without it a crashing task is retried for ever.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        numbers = ray.data.range(len(shards), override_num_blocks=len(shards))
        dataset = numbers.map_batches(read, batch_size=1, batch_format="pyarrow", zero_copy_batch=True, max_retries=_RETRIES)
    with own_errors():
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def spread(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, in_flight: int) -> Iterator[Any]:
    """Call a function with each of the arguments on the cluster, at most `in_flight` at a time; results as they finish."""
    task = ray.remote(max_retries=_RETRIES)(function)
    waiting: list[Any] = []
    with own_errors():
        for argument in arguments:
            waiting.append(task.remote(*argument))
            if len(waiting) >= in_flight:
                done, waiting = ray.wait(waiting, num_returns=1)
                yield ray.get(done[0])
        yield from (ray.get(reference) for reference in waiting)


@contextmanager
def own_errors() -> Iterator[None]:
    """Bring our own errors back from a worker; others stay as Ray reports them."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CatalogEmbedError) and not isinstance(error, ray.exceptions.RayError):
            raise  # brought back already; its context is Ray's own copy, whose message is a traceback
        cause: BaseException | None = error
        while cause is not None:
            inner = getattr(cause, "cause", None)
            cause = inner if isinstance(inner, BaseException) else cause.__cause__ or cause.__context__
            if isinstance(cause, CatalogEmbedError):
                # Ray Data appends advice about its own retry settings to the message.
                raise type(cause)(str(cause).partition("\nFailed to apply UDF")[0]) from None
        raise
