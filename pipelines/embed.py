"""The embed stage on Ray Data: parts to make go in, durable parts of the vector log come out, as they finish.

Tasks read the planned rows again and render them, and tokenise ahead where the actors have GPUs; actors hold the tower,
tasks write. Parts without a forward pass need no actor, and start no tower. A part that is there already is verified and
passed on. Never connects to Ray by itself.
"""

from __future__ import annotations

import gc
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.exceptions
import ray.util.annotations

from encoder.errors import TowerError
from encoder.registry import TowerOptions
from encoder.tokens import Tokenizer, Tokens
from pipelines.careful import Note, TextEncoder, WorkerBroken, check_alive, embed_texts
from pipelines.cargo import batch_of, embedded, facts_of, finished, text_of, to_embed
from pipelines.contracts import Shard
from pipelines.errors import CatalogEmbedError, EmbedError, InputError
from pipelines.manifest import ManifestObject
from pipelines.parts import PartDone, PartLog, PartWork, copied, distinct, from_ipc, ipc, with_vectors, without_vectors
from pipelines.planned_rows import fetch
from pipelines.pool import Pool, PoolOptions, Tokenize, pool
from pipelines.prepare import Preparer
from pipelines.schema import ACTION, ID, ID_HASH, QUARANTINE, ROW, SHARD, TEXT_HASH, VECTOR, VECTOR_TYPES
from pipelines.storage import Store
from pipelines.towers import fetch as fetch_tower
from pipelines.towers import open_encoder
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
# So many rows for an actor take minutes on a CPU, and finding the best pace some seconds.
_WORTH_CALIBRATING = 50_000
# When nothing at all succeeds, so few are enough.
_ALL_FAILED_ROWS = 10

# The tokenizer of this worker process, under the fingerprint of its tower.
_TOKENIZERS: dict[str, Tokenizer] = {}


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """What all parts of a run share. What is None from `actors` on follows the cluster, or the encoder's own choice.

    `tokenize` says who makes ids of texts: the tasks that read them, `ahead`, or the `actor`; `auto` is ahead of GPUs.
    """

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
    lanes: int | None = None
    tokenize: Tokenize = "auto"
    encoder_factory: Callable[..., Any] = open_encoder

    def __post_init__(self) -> None:
        if self.vector not in VECTOR_TYPES:
            raise InputError(f"vector type `{self.vector}` is unknown. Use one of: {', '.join(VECTOR_TYPES)}.")
        for name in ("actors", "token_budget", "threads", "lanes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}. Use at least 1, or leave it out.")
        if (gpus := self.gpus_per_actor) is not None and (gpus < 0 or (gpus > 1 and gpus % 1)):
            raise InputError(f"gpus_per_actor is {gpus}. Use 0 for CPUs, a share of a GPU, or a whole number of them.")
        if self.tokenize not in get_args(Tokenize):
            raise InputError(f"tokenize is `{self.tokenize}`. Use one of: {', '.join(get_args(Tokenize))}.")

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
        with own_errors():
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
    options = PoolOptions(actors=job.actors, gpus_per_actor=job.gpus_per_actor, threads=job.threads, tokenize=job.tokenize)
    plan = pool([node["Resources"] for node in ray.nodes() if node["Alive"]], options, parts=len(waiting))
    bare = replace(job, shards=())
    tokenizer = ray.remote(max_retries=_RETRIES)(_tokenizer).remote(bare) if plan.ahead else None
    plain: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    with warnings.catch_warnings():
        # As in `workers.scan`: without the bound on retries a crashing task is retried for ever.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        dataset = (
            ray.data.range(len(waiting), override_num_blocks=len(waiting))
            .map_batches(_Read(maker, waiting, job.fingerprint, tokenizer), max_retries=_RETRIES, **plain)
            .map_batches(
                _Tower,
                fn_constructor_kwargs={"job": bare, "pool": plan, "rows": rows, "limit": limit, "session": secrets.token_hex(8)},
                compute=ray.data.ActorPoolStrategy(size=plan.actors, max_tasks_in_flight_per_actor=_IN_FLIGHT),
                num_cpus=plan.cpus,
                num_gpus=plan.gpus,
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


def _tokenizer(job: EmbedJob) -> bytes:
    """Return the tokenizer of the tower; once for all tasks, because this imports torch and reads every file of the tower."""
    tokenizer = Tokenizer(fetch_tower(job.store, job.tower_objects), job.tower)
    if tokenizer.card.fingerprint != job.fingerprint:
        raise TowerError(f"expected the tower {job.fingerprint}, found {tokenizer.card.fingerprint}. Install the tower of that name.")
    return tokenizer.to_json()


# All stages are generators: of an error in a plain function Ray Data 2.60 keeps a text, of one in a generator the error itself.


@dataclass(frozen=True)
class _Read:
    """Reads the rows of a part and renders its texts, each once; or finds that the part is there."""

    maker: _Maker
    parts: Sequence[Any]
    fingerprint: str
    tokenizer: Any | None

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        yield self._read(numbers.column(0)[0].as_py())

    def _read(self, index: int) -> pa.Table:
        work, log = _received(ray.get(self.parts[index])), self.maker.log
        key = log.content_key(work)
        if (done := log.existing(work, key=key)) is not None:
            return finished(index, done.pack())
        rows, texts = self.maker.rows(work)
        first, _ = distinct(rows.column(TEXT_HASH))
        texts = texts.take(pa.array(first))
        return to_embed(index, rows, texts, self._tokens(texts), {"key": key, "number": work.number, "texts": len(texts)})

    def _tokens(self, texts: pa.StringArray) -> Tokens | None:
        """Return ids made ahead. Where the tokenizer fails on a text there are none: the actor finds which text it is."""
        if self.tokenizer is None:
            return None
        if (tokenizer := _TOKENIZERS.get(self.fingerprint)) is None:
            # As many tasks run as there are cores, so each keeps to its own.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            tokenizer = Tokenizer.from_json(_got(self.tokenizer))
            _TOKENIZERS.clear()
            _TOKENIZERS[self.fingerprint] = tokenizer
        try:
            return tokenizer.tokenize(texts)
        except Exception:  # noqa: BLE001  the library raises nothing narrower
            return None


def _got(reference: Any) -> bytes:
    """Return what a task made, or raise its error without Ray's copy around it."""
    try:
        data: bytes = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return data


class _Tower:
    """The life of one actor: a tower, opened when the first texts come, and the vectors of one part after the other."""

    def __init__(self, *, job: EmbedJob, pool: Pool, rows: int, limit: int, session: str) -> None:
        self._job = job
        self._pool = pool
        self._rows = rows
        self._limit = limit
        self._session = session
        self._encoder: TextEncoder | None = None

    def __call__(self, cargo: pa.Table) -> Iterator[pa.Table]:
        """Add the vectors of a part's texts, or why there are none."""
        yield cargo if cargo.column("done")[0].is_valid else self._forward(cargo)

    def _forward(self, cargo: pa.Table) -> pa.Table:
        encoder = self._encoder = self._encoder or self._open()
        facts, batch = facts_of(cargo), batch_of(cargo)
        note = Note(self._job.store, self._job.log.note_place(facts["number"]))
        attempt = note.begin(key=facts["key"], session=self._session)
        tokens, halvings, began = encoder.tokens_encoded, encoder.halvings, time.perf_counter()
        try:
            found = embed_texts(encoder, batch, dims=self._job.dims, limit=self._limit, note=note, attempt=attempt)
        except WorkerBroken:
            os._exit(1)  # Ray starts another in its place, and the note says how to go on
        facts |= {
            "failed": {index: [reason, text_of(cargo, index)] for index, reason in found.failed.items()},
            "tokens": encoder.tokens_encoded - tokens,
            "halvings": encoder.halvings - halvings,
            "seconds": time.perf_counter() - began,
            "attempts": attempt.number,
        }
        return embedded(cargo, found.vectors, facts)

    def _open(self) -> TextEncoder:
        job, pool = self._job, self._pool
        directory = fetch_tower(job.store, job.tower_objects)
        how = {"token_budget": job.token_budget, "threads": pool.threads, "lanes": job.lanes, "device": pool.device}
        many = self._rows >= _WORTH_CALIBRATING * pool.actors
        encoder: TextEncoder = job.encoder_factory(directory, tower=job.tower, fingerprint=job.fingerprint, calibrate=many, **how)
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
        facts = facts_of(cargo)
        # Made float16 here and not in the actor, which has a GPU to feed.
        values = np.frombuffer(cargo.column("vectors")[0].as_buffer(), np.float32).astype(log.vector, copy=False)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), type=log.columns.field(VECTOR).type)
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
