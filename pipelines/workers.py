"""The one face that reading and planning show to Ray: shards through a function, and arguments through a function.

Order is not kept, and nothing above this module may depend on it. A task that dies with its worker is tried again
three times, Ray's default for tasks (actors would be restarted for ever); an error that the code raised on purpose comes back as itself, without Ray's wrapping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.data
import ray.exceptions

from pipelines.contracts import Shard
from pipelines.errors import CatalogEmbedError


class Prepare(Protocol):
    """What is done to every batch of a shard, on a worker. Picklable."""

    def __call__(self, batch: pa.RecordBatch, *, shard: str, first_row: int) -> pa.Table:
        """Return what shall travel back."""
        ...


@dataclass(frozen=True)
class _ReadShards:
    """Opens the shards whose numbers a block holds and prepares their batches."""

    shards: Sequence[Shard]
    prepare: Prepare

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        for number in numbers.column(0).to_pylist():
            first_row = 0
            for batch in self.shards[number].open():
                yield self.prepare(batch, shard=self.shards[number].name, first_row=first_row)
                first_row += batch.num_rows


def scan(shards: Sequence[Shard], prepare: Prepare) -> Iterator[pa.Table]:
    """Read every shard on the cluster and stream what `prepare` made of its batches, as they finish."""
    if not shards:
        return
    dataset = ray.data.range(len(shards), override_num_blocks=len(shards)).map_batches(
        _ReadShards(shards, prepare), batch_size=1, batch_format="pyarrow", zero_copy_batch=True
    )
    with _own_errors():
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def spread(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, in_flight: int) -> Iterator[Any]:
    """Call a function with each of the arguments on the cluster, at most `in_flight` at a time; results as they finish."""
    task = ray.remote(function)
    waiting: list[Any] = []
    with _own_errors():
        for argument in arguments:
            waiting.append(task.remote(*argument))
            if len(waiting) >= in_flight:
                done, waiting = ray.wait(waiting, num_returns=1)
                yield ray.get(done[0])
        yield from (ray.get(reference) for reference in waiting)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Bring our own errors back from a worker; others stay as Ray reports them."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            inner = getattr(cause, "cause", None)
            cause = inner if isinstance(inner, BaseException) else cause.__cause__ or cause.__context__
            if isinstance(cause, CatalogEmbedError):
                # Ray Data appends advice about its own retry settings to the message.
                raise type(cause)(str(cause).partition("\nFailed to apply UDF")[0]) from None
        raise
