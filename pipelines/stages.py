"""What happens to one part on its way: read and render, tokenise, embed, write. Each stage runs on a worker.

All stages are generators: of an error in a plain function Ray Data 2.60 keeps a text, of one in a generator the error itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.exceptions

from encoder.errors import TowerError
from encoder.registry import TowerOptions
from encoder.tokens import Tokenizer, Tokens
from pipelines.careful import Note, TextEncoder, WorkerBroken, check_alive, embed_texts
from pipelines.cargo import batch_of, embedded, facts_of, finished, text_of, to_embed
from pipelines.contracts import Shard
from pipelines.errors import InputError
from pipelines.manifest import ManifestObject
from pipelines.parts import PartDone, PartLog, PartWork, copied, distinct, from_ipc, ipc, with_vectors, without_vectors
from pipelines.planned_rows import fetch
from pipelines.pool import Pool, PoolOptions, Tokenize
from pipelines.prepare import Preparer
from pipelines.schema import ACTION, ID, ID_HASH, QUARANTINE, ROW, SHARD, TEXT_HASH, VECTOR, VECTOR_TYPES
from pipelines.storage import Store
from pipelines.towers import fetch as fetch_tower
from pipelines.towers import open_encoder
from pipelines.turns import Turn

# So many rows for an actor take minutes on a CPU, and finding the best pace some seconds.
_WORTH_CALIBRATING = 50_000
# What is sent on in place of a part when it is the turn of others.
POSTPONED = b""

# The tokenizer of this worker process, under the fingerprint of its tower.
_TOKENIZERS: dict[str, Tokenizer] = {}


@dataclass(frozen=True, kw_only=True)
class EmbedJob(PoolOptions):
    """What all parts of a run share. What is None follows the cluster, or the encoder's own choice.

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
    token_budget: int | None = None
    lanes: int | None = None
    encoder_factory: Callable[..., Any] = open_encoder
    turn: Turn | None = None

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


@dataclass(frozen=True, kw_only=True)
class Maker:
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


def sent(work: PartWork) -> bytes:
    """Fold work into bytes; a slice of a table would otherwise travel with all of its parent."""
    vectors = None if work.vectors is None else ipc(work.vectors)
    return ipc(
        pa.table(
            {"number": [work.number], "kind": [work.kind], "rows": [ipc(work.rows)], "vectors": pa.array([vectors], pa.large_binary())}
        )
    )


def received(data: bytes) -> PartWork:
    """Give back what `sent` folded."""
    row = from_ipc(data).to_pylist()[0]
    vectors = None if row["vectors"] is None else from_ipc(row["vectors"])
    return PartWork(number=row["number"], kind=row["kind"], rows=from_ipc(row["rows"]), vectors=vectors)


def make(maker: Maker, sent: bytes) -> bytes:
    """Make one part without a forward pass."""
    work, log = received(sent), maker.log
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


def make_tokenizer(job: EmbedJob) -> bytes:
    """Return the tokenizer of the tower; once for all tasks, because this imports torch and reads every file of the tower."""
    tokenizer = Tokenizer(fetch_tower(job.store, job.tower_objects), job.tower)
    if tokenizer.card.fingerprint != job.fingerprint:
        raise TowerError(f"expected the tower {job.fingerprint}, found {tokenizer.card.fingerprint}. Install the tower of that name.")
    return tokenizer.to_json()


@dataclass(frozen=True)
class Read:
    """Reads the rows of a part and renders its texts, each once; or finds that the part is there."""

    maker: Maker
    parts: Sequence[Any]
    fingerprint: str
    tokenizer: Any | None
    turn: Turn | None

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        """Read the part that a row names."""
        yield self._read(numbers.column(0)[0].as_py())

    def _read(self, index: int) -> pa.Table:
        if self.turn is not None and self.turn.hindered() is not None:
            return finished(index, POSTPONED)
        work, log = received(ray.get(self.parts[index])), self.maker.log
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


class Tower:
    """The life of one actor: a tower, opened when the first texts come, and the vectors of one part after the other."""

    def __init__(self, *, job: EmbedJob, pool: Pool, rows: int, limit: int, session: str) -> None:
        self._job = job
        self._pool = pool
        self._rows = rows
        self._limit = limit
        self._session = session
        self._encoder: TextEncoder | None = None
        self._free_since = time.perf_counter()

    def __call__(self, cargo: pa.Table) -> Iterator[pa.Table]:
        """Add the vectors of a part's texts, or why there are none."""
        if cargo.column("done")[0].is_valid:
            yield cargo
        elif self._job.turn is not None and self._job.turn.hindered() is not None:
            # Asked once more, because parts are read ahead of the actor.
            yield finished(cargo.column("index")[0].as_py(), POSTPONED)
        else:
            yield self._forward(cargo)

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
            "waited": began - self._free_since,
            "attempts": attempt.number,
        }
        self._free_since = time.perf_counter()
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
class Write:
    """Gives every row the vector of its text, and makes the part durable."""

    maker: Maker
    parts: Sequence[Any]

    def __call__(self, cargo: pa.Table) -> Iterator[pa.Table]:
        """Pass on what became of a part."""
        if (packed := cargo.column("done")[0].as_py()) is None:
            packed = self._write(cargo).pack()
        yield pa.table({"index": cargo.column("index"), "done": pa.array([packed], pa.large_binary())})

    def _write(self, cargo: pa.Table) -> PartDone:
        work, log = received(ray.get(self.parts[cargo.column("index")[0].as_py()])), self.maker.log
        facts = facts_of(cargo)
        # Made float16 here and not in the actor, which has a GPU to feed.
        values = np.frombuffer(cargo.column("vectors")[0].as_buffer(), np.float32).astype(log.vector, copy=False)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), type=log.columns.field(VECTOR).type)
        failed = {int(index): (reason, text) for index, (reason, text) in facts["failed"].items()}
        rows, rejected = with_vectors(from_ipc(cargo.column("rows")[0].as_buffer()), vectors, failed)
        done = log.finish(work, rows, rejected=rejected, key=facts["key"])
        Note(log.store, log.note_place(work.number)).end()
        return replace(done, **{name: facts[name] for name in ("texts", "tokens", "halvings", "seconds", "waited", "attempts")})
