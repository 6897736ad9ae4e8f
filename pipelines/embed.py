"""The embed stage on Ray Data: parts to make go in, durable parts of the vector log come out, as they finish.

Tasks read the planned rows again and render them, actors hold the tower, tasks write. Parts without a forward pass need
no actor, and start no tower. A part that is there already is verified and passed on. Never connects to Ray by itself.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.exceptions
import ray.util.annotations

from encoder.errors import TowerError
from encoder.registry import TowerOptions
from pipelines.careful import Note, TextEncoder, WorkerBroken, check_alive, embed_texts
from pipelines.contracts import Shard
from pipelines.errors import CatalogEmbedError, EmbedError, InputError
from pipelines.manifest import ManifestObject
from pipelines.parts import PartDone, PartLog, PartWork, copied, distinct, from_ipc, ipc, with_vectors, without_vectors
from pipelines.planned_rows import fetch
from pipelines.prepare import Preparer
from pipelines.schema import ACTION, ID, ID_HASH, QUARANTINE, ROW, SHARD, TEXT_HASH, VECTOR, VECTOR_TYPES
from pipelines.storage import Store
from pipelines.towers import fetch as fetch_tower
from pipelines.workers import _own_errors, spread

__all__ = ["EmbedJob", "PartDone", "PartWork", "open_encoder", "run_parts"]

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

# What travels between the stages: one row for each part, so that nothing on the way splits or merges parts. All stages
# are generators: of an error in a plain function Ray Data 2.60 keeps a text, of one in a generator the error itself.
_CARGO = pa.schema(
    [
        ("index", pa.int64()),
        ("done", pa.large_binary()),
        ("rows", pa.large_binary()),
        ("texts", pa.list_(pa.string())),
        ("vectors", pa.large_binary()),
        ("facts", pa.string()),
    ]
)


def open_encoder(
    directory: Path, *, tower: TowerOptions, fingerprint: str, token_budget: int | None, threads: int | None, device: str
) -> Any:
    """Open the tower of a directory, on the worker that is going to use it."""
    from encoder.inference import EncodeOptions, Encoder  # noqa: PLC0415  torch loads only where texts are embedded

    options = EncodeOptions(token_budget=token_budget, threads=threads, device=device)
    return Encoder(directory, tower=tower, fingerprint=fingerprint, options=options)


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """What all parts of a run share. `actors`, `gpus_per_actor` and `threads` follow the cluster where they are None."""

    store: Store
    run_id: str
    shards: Sequence[Shard]
    preparer: Preparer
    tower_objects: tuple[ManifestObject, ...]
    tower: TowerOptions
    fingerprint: str
    dims: int
    vector: str
    actors: int | None = None
    gpus_per_actor: float | None = None
    token_budget: int | None = None
    threads: int | None = None
    encoder_factory: Callable[..., Any] = open_encoder

    def __post_init__(self) -> None:
        if self.vector not in VECTOR_TYPES:
            raise InputError(f"vector type `{self.vector}` is unknown. Use one of: {', '.join(VECTOR_TYPES)}.")
        for name, value in (("actors", self.actors), ("token_budget", self.token_budget), ("threads", self.threads)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}. Use at least 1, or leave it out.")
        if self.gpus_per_actor is not None and self.gpus_per_actor < 0:
            raise InputError(f"gpus_per_actor is {self.gpus_per_actor}. Use 0 for CPUs, or more.")

    @property
    def log(self) -> PartLog:
        """Where the parts go."""
        schema = self.preparer.normalizing.schema
        return PartLog(
            store=self.store, run_id=self.run_id, fingerprint=self.fingerprint, schema=schema, dims=self.dims, vector=self.vector
        )


def run_parts(work: Iterable[PartWork], job: EmbedJob) -> Iterator[PartDone]:
    """Make every part durable and yield it, in any order: first those without a forward pass, then those with one.

    `work` is consumed once; rows to embed wait in Ray's object store, which spills to disk, the others a few at a time.
    """
    maker = _Maker(log=job.log, preparer=job.preparer, shards={shard.name: ray.put(shard) for shard in job.shards})
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
                waiting.append(ray.put(_sent(item)))
                rows += item.rows.num_rows
            elif item.rows.num_rows <= left:
                left -= item.rows.num_rows
                here.append(_make(maker, _sent(item)))
            else:
                yield shared, _sent(item)

    in_flight = max(2, int(ray.cluster_resources().get("CPU", 1)))
    try:
        with _own_errors():
            for packed in spread(_make, others(), in_flight=in_flight):
                yield PartDone.unpack(packed)
            yield from map(PartDone.unpack, here)
            if waiting:
                yield from _embed(waiting, rows, maker, job)
    except Exception as error:  # noqa: BLE001  every error is raised again below
        failure = _own(error)
    else:
        return
    # An error of Ray Data and its actors hold each other, and with them the CPUs that another run waits for.
    failure.__context__ = None
    gc.collect()
    raise failure


def _embed(waiting: Sequence[Any], rows: int, maker: _Maker, job: EmbedJob) -> Iterator[PartDone]:
    """Run the parts that need the tower through readers, actors and writers."""
    limit = max(_MOST_FAILED_ROWS, ceil(_MOST_FAILED_RATIO * rows))
    pool = _pool(job, len(waiting))
    plain: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    with warnings.catch_warnings():
        # As in `workers.scan`: without the bound on retries a crashing task is retried for ever.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        dataset = (
            ray.data.range(len(waiting), override_num_blocks=len(waiting))
            .map_batches(_Read(maker, waiting), max_retries=_RETRIES, **plain)
            .map_batches(
                _Tower,
                fn_constructor_kwargs={"job": replace(job, shards=()), "pool": pool, "limit": limit, "session": secrets.token_hex(8)},
                compute=ray.data.ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=_IN_FLIGHT),
                num_cpus=pool.cpus,
                num_gpus=pool.gpus,
                max_restarts=_MAX_RESTARTS,
                max_task_retries=_MAX_TASK_RETRIES,
                **plain,
            )
            .map_batches(_Write(maker, waiting), max_retries=_RETRIES, **plain)
        )
    seen = failed = 0
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for packed in batch.column("done").to_pylist():
            done = PartDone.unpack(packed)
            yield done
            seen += done.rows + done.lost.num_rows
            failed += done.lost.num_rows
            if failed > limit:
                raise EmbedError(f"{failed} of {seen} rows cannot be embedded, more than {limit}. {_ADVICE}")
    if failed == seen >= _ALL_FAILED_ROWS:
        raise EmbedError(f"none of {seen} rows can be embedded. {_ADVICE}")


_ADVICE = "So it is not the rows: check the tower with `catalog-embed doctor`, and run again to resume."


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """How many actors there are, and what each has."""

    actors: int
    cpus: float
    gpus: float
    threads: int | None
    device: str


def _pool(job: EmbedJob, parts: int) -> _Pool:
    """Fit actors to the cluster, and always leave a CPU for the tasks that feed them: they would wait for each other."""
    total = ray.cluster_resources()
    gpus = total.get("GPU", 0.0)
    each = job.gpus_per_actor if job.gpus_per_actor is not None else min(gpus, 1.0)
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    nodes = [cpus for cpus in nodes if cpus >= 1] or [1.0]
    if each:
        actors = job.actors or max(1, int(gpus / each))
        if actors * each > gpus:
            raise InputError(
                f"{actors} actors with {each:g} GPUs are more than the cluster's {gpus:g}. Lower `actors` or `gpus_per_actor`."
            )
        cpus = 1.0 if sum(nodes) > actors else 0.0
        return _Pool(actors=min(actors, parts), cpus=cpus, gpus=each, threads=job.threads, device="cuda")
    # One process with all cores of its machine; the readers need little beside it.
    actors = min(job.actors or len(nodes), parts)
    a_node = ceil(actors / len(nodes))
    share = (min(nodes) - 1) / a_node
    cpus = float(int(share)) if share >= 1 else int(share * 100) / 100
    threads = job.threads or max(1, int(min(nodes) / a_node))
    return _Pool(actors=actors, cpus=cpus, gpus=0.0, threads=threads, device="cpu" if gpus else "auto")


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """What reading and writing a part needs. Shards are references: a task fetches those that it reads, and no others."""

    log: PartLog
    preparer: Preparer
    shards: Mapping[str, Any]

    def open_shard(self, name: str) -> Shard | None:
        """Return a shard by its name."""
        reference = self.shards.get(name)
        return None if reference is None else ray.get(reference)

    def rows(self, work: PartWork) -> tuple[pa.Table, pa.StringArray]:
        """Return a part's rows in the order of their hashes, with the columns of the log and where they stand, and their texts."""
        planned = work.rows.take(pc.sort_indices(work.rows.column(ID_HASH)))
        rows, texts = fetch(planned, self.open_shard, self.preparer)
        for name in (ACTION, SHARD, ROW):
            rows = rows.append_column(name, planned.column(name))
        return rows, texts


def _sent(work: PartWork) -> bytes:
    """Fold work into bytes; a slice of a table would otherwise travel with all of its parent."""
    vectors = None if work.vectors is None else ipc(work.vectors)
    return ipc(
        pa.table(
            {"number": [work.number], "kind": [work.kind], "rows": [ipc(work.rows)], "vectors": pa.array([vectors], pa.large_binary())}
        )
    )


def _received(data: bytes) -> PartWork:
    row = from_ipc(data).to_pylist()[0]
    vectors = None if row["vectors"] is None else from_ipc(row["vectors"])
    return PartWork(number=row["number"], kind=row["kind"], rows=from_ipc(row["rows"]), vectors=vectors)


def _make(maker: _Maker, sent: bytes) -> bytes:
    """Make one part without a forward pass."""
    work, log = _received(sent), maker.log
    key = log.content_key(work)
    done = log.existing(work, key=key)
    if done is None:
        if work.kind == "delete":
            rows = work.rows.select([ID, ID_HASH, ACTION])
        else:
            rows, _ = maker.rows(work)
        if work.kind == "copy":
            assert work.vectors is not None, "a copy comes with its vectors"
            rows = copied(rows, work.vectors, log.columns)
        done = log.finish(work, without_vectors(rows, log.columns), rejected=QUARANTINE.empty_table(), key=key)
    return done.pack()


def _cargo(**values: Any) -> pa.Table:
    return pa.table([pa.array([values.get(field.name)], field.type) for field in _CARGO], schema=_CARGO)


@dataclass(frozen=True)
class _Read:
    """Reads the rows of a part and renders its texts, each once; or finds that the part is there."""

    maker: _Maker
    parts: Sequence[Any]

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        yield self._read(numbers.column(0)[0].as_py())

    def _read(self, index: int) -> pa.Table:
        work, log = _received(ray.get(self.parts[index])), self.maker.log
        key = log.content_key(work)
        if (done := log.existing(work, key=key)) is not None:
            return _cargo(index=index, done=done.pack())
        rows, texts = self.maker.rows(work)
        first, _ = distinct(rows.column(TEXT_HASH))
        facts = {"key": key, "number": work.number}
        return _cargo(index=index, rows=ipc(rows), texts=texts.take(pa.array(first)).to_pylist(), facts=json.dumps(facts))


class _Tower:
    """The life of one actor: a tower, opened when the first texts come, and the vectors of one part after the other."""

    def __init__(self, *, job: EmbedJob, pool: _Pool, limit: int, session: str) -> None:
        self._job = job
        self._pool = pool
        self._limit = limit
        self._session = session
        self._encoder: TextEncoder | None = None

    def __call__(self, cargo: pa.Table) -> Iterator[pa.Table]:
        """Add the vectors of a part's texts, or why there are none."""
        yield cargo if cargo.column("done")[0].is_valid else self._forward(cargo)

    def _forward(self, row: pa.Table) -> pa.Table:
        encoder = self._encoder = self._encoder or self._open()
        facts = json.loads(row.column("facts")[0].as_py())
        texts = row.column("texts")[0].as_py()
        note = Note(self._job.store, self._job.log.note_place(facts["number"]))
        attempt = note.begin(key=facts["key"], session=self._session)
        tokens, halvings, began = encoder.tokens_encoded, encoder.halvings, time.perf_counter()
        try:
            found = embed_texts(encoder, texts, dims=self._job.dims, limit=self._limit, note=note, attempt=attempt)
        except WorkerBroken:
            os._exit(1)  # Ray starts another in its place, and the note says how to go on
        facts |= {
            "failed": {index: [reason, texts[index]] for index, reason in found.failed.items()},
            "texts": len(texts),
            "tokens": encoder.tokens_encoded - tokens,
            "halvings": encoder.halvings - halvings,
            "seconds": time.perf_counter() - began,
            "attempts": attempt.number,
        }
        vectors = found.vectors.astype(np.dtype(self._job.vector)).tobytes()
        return _cargo(index=row.column("index")[0].as_py(), rows=row.column("rows")[0].as_py(), vectors=vectors, facts=json.dumps(facts))

    def _open(self) -> TextEncoder:
        job, pool = self._job, self._pool
        directory = fetch_tower(job.store, job.tower_objects)
        how = {"token_budget": job.token_budget, "threads": pool.threads, "device": pool.device}
        encoder: TextEncoder = job.encoder_factory(directory, tower=job.tower, fingerprint=job.fingerprint, **how)
        check_alive(encoder, dims=job.dims)
        return encoder


@dataclass(frozen=True)
class _Write:
    """Gives every row the vector of its text, and makes the part durable."""

    maker: _Maker
    parts: Sequence[Any]

    def __call__(self, cargo: pa.Table) -> Iterator[pa.Table]:
        if (packed := cargo.column("done")[0].as_py()) is None:
            packed = self._write(cargo).pack()
        yield pa.table({"done": pa.array([packed], pa.large_binary())})

    def _write(self, cargo: pa.Table) -> PartDone:
        work, log = _received(ray.get(self.parts[cargo.column("index")[0].as_py()])), self.maker.log
        facts = json.loads(cargo.column("facts")[0].as_py())
        values = pa.Array.from_buffers(VECTOR_TYPES[log.vector], facts["texts"] * log.dims, [None, cargo.column("vectors")[0].as_buffer()])
        vectors = pa.FixedSizeListArray.from_arrays(values, type=log.columns.field(VECTOR).type)
        failed = {int(index): (reason, text) for index, (reason, text) in facts["failed"].items()}
        rows, rejected = with_vectors(from_ipc(cargo.column("rows")[0].as_buffer()), vectors, failed)
        done = log.finish(work, rows, rejected=rejected, key=facts["key"])
        Note(log.store, log.note_place(work.number)).end()
        return replace(done, **{name: facts[name] for name in ("texts", "tokens", "halvings", "seconds", "attempts")})


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
