"""A part of a run: which rows it is made of, the key of its content, and how it becomes durable once and is found again.

A part counts when its file stands in the vector log; the rows that it could not take stand beside the run before that.
A part that is there with the same content is verified and not made again; with other content it is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contracts import ObjectRef
from pipelines.errors import AlreadyExists, CorruptObject, PlanError
from pipelines.manifest import ManifestObject
from pipelines.schema import (
    ACTION,
    ATTR_HASH,
    CHANGES,
    ID,
    ID_HASH,
    QUARANTINE,
    RENDERED,
    ROW,
    SHARD,
    TEXT_HASH,
    VECTOR,
    ProductSchema,
    part_schema,
)
from pipelines.storage import Store
from pipelines.stores.parquet import CONTENT, FINGERPRINT, KIND, decode, metadata_of, write_part, write_rows

Kind = Literal["embed", "copy", "attr", "delete"]

STAGE_NAME = "embed"
_EXCERPT_BYTES = 200
_REJECTED = "rejected"


@dataclass(frozen=True, kw_only=True)
class PartWork:
    """The rows of one part, as CHANGES has them, and for a copy the vectors of its texts (text_hash, vector).

    Up to some ten thousand rows, neighbours in the source: a part opens every shard that its rows name.
    """

    number: int
    kind: Kind
    rows: pa.Table
    vectors: pa.Table | None = None


@dataclass(frozen=True, kw_only=True)
class PartDone:
    """A part that is durable. `texts` counts forward passes; `lost` are the planned rows that are in no part.

    `seconds` were spent in forward passes, and before them the actor `waited`: for its tower, or for this part.
    """

    number: int
    object: ManifestObject | None
    rows: int
    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    halvings: int = 0
    attempts: int = 0
    skipped: bool = False
    rejected: pa.Table
    lost: pa.Table

    def pack(self) -> bytes:
        """Fold into bytes, as workers send it."""
        tables = {"rejected": [ipc(self.rejected)], "lost": [ipc(self.lost)]}
        item = self.object
        known = None if item is None else {name.name: getattr(item, name.name) for name in fields(item)}
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in (*tables, "object")}
        return ipc(pa.table({"facts": [json.dumps({**plain, "object": known})], **tables}))

    @classmethod
    def unpack(cls, data: bytes) -> PartDone:
        """Give back what `pack` folded."""
        row = from_ipc(data).to_pylist()[0]
        facts = json.loads(row["facts"])
        facts["object"] = ManifestObject(**facts["object"]) if facts["object"] else None
        return cls(rejected=from_ipc(row["rejected"]), lost=from_ipc(row["lost"]), **facts)


@dataclass(frozen=True, kw_only=True)
class PartLog:
    """Where the parts of one run go, and what they are made with. Picklable."""

    store: Store
    run_id: str
    fingerprint: str
    schema: ProductSchema
    dims: int
    vector: str

    @property
    def columns(self) -> pa.Schema:
        """The columns of a part."""
        return part_schema(self.schema, dims=self.dims, vector=self.vector)

    def place(self, number: int) -> str:
        """Return the key of a part."""
        return f"vectors/{self.run_id}/part-{number:05d}.parquet"

    def note_place(self, number: int) -> str:
        """Return the key of the note about a part that is being made."""
        return f"runs/{self.run_id}/attempts/part-{number:05d}.json"

    def content_key(self, work: PartWork) -> str:
        """Hash what a part is made of: tower, vector type, kind, and every row's hashes, in whatever order they came."""
        rows = work.rows.take(pc.sort_indices(work.rows.column(ID_HASH)))
        layout = f"{self.fingerprint}\n{self.vector}\n{self.dims}\n{work.kind}\n{self.columns.to_string()}"
        digest = hashlib.sha256(layout.encode())
        for name in (ID_HASH, TEXT_HASH, ATTR_HASH):
            digest.update(b"".join(value or b"" for value in rows.column(name).to_pylist()))
        digest.update("\n".join(rows.column(ACTION).to_pylist()).encode())
        return digest.hexdigest()

    def existing(self, work: PartWork, *, key: str) -> PartDone | None:
        """Return the part if an earlier attempt made it durable, after reading all of it."""
        place = self.place(work.number)
        if self.store.head(place) is None:
            return self._rejected_whole(work, key)
        data = self.store.get(place)
        where = self.store.uri(place)
        metadata = metadata_of(data, where=where)
        if metadata.get(CONTENT) != key:
            raise AlreadyExists(
                f"{where} was made of other rows, or for another tower, than this plan's part {work.number}. "
                "A run id belongs to one plan: start a new run, which copies what is paid for."
            )
        table = decode(data, where=where)
        rejected = QUARANTINE.empty_table()
        if int(metadata.get(_REJECTED, "0")):
            rejected = self._read_rejected(work.number, key) or rejected
        ref = ObjectRef(key=place, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        return self._done(work, table, ref, rejected=rejected, skipped=True)

    def finish(self, work: PartWork, table: pa.Table, *, rejected: pa.Table, key: str) -> PartDone:
        """Make a part durable: first the rows that it lacks, then the part itself, unless no row is left."""
        if rejected.num_rows:
            said = {CONTENT: key, "left": str(table.num_rows)}
            self.store.put(self._rejected_place(work.number), write_rows(rejected, metadata=said))
        if not table.num_rows:
            return self._done(work, table, None, rejected=rejected)
        metadata = {CONTENT: key, FINGERPRINT: self.fingerprint, KIND: work.kind, VECTOR: self.vector, _REJECTED: str(rejected.num_rows)}
        data = write_part(table.select(self.columns.names).cast(self.columns), metadata=metadata)
        try:
            ref = self.store.put_if_absent(self.place(work.number), data)
        except AlreadyExists:
            # Our own write whose answer was lost, or an attempt that died after it: equal content is as good.
            if (found := self.existing(work, key=key)) is None:
                raise
            return replace(found, skipped=False)
        return self._done(work, table, ref, rejected=rejected)

    def _done(self, work: PartWork, table: pa.Table, ref: ObjectRef | None, *, rejected: pa.Table, skipped: bool = False) -> PartDone:
        item = None if ref is None else ManifestObject.of(ref, role="vectors", rows=table.num_rows)
        kept = pc.is_in(work.rows.column(ID_HASH), _whole(table.column(ID_HASH)))
        lost = work.rows.filter(pc.invert(kept)).select(CHANGES.names).cast(CHANGES)
        if lost.num_rows != rejected.num_rows:
            where = self.store.uri(self.place(work.number))
            raise CorruptObject(f"{where}: {lost.num_rows} planned rows are missing, {rejected.num_rows} were rejected. Start a new run.")
        return PartDone(number=work.number, object=item, rows=table.num_rows, rejected=rejected, lost=lost, skipped=skipped)

    def _rejected_place(self, number: int) -> str:
        return f"runs/{self.run_id}/rejected/part-{number:05d}.parquet"

    def _read_rejected(self, number: int, key: str, *, left: str | None = None) -> pa.Table | None:
        place = self._rejected_place(number)
        if self.store.head(place) is None:
            return None
        data = self.store.get(place)
        metadata = metadata_of(data, where=place)
        if metadata.get(CONTENT) != key or left not in (None, metadata.get("left")):
            return None
        return decode(data, where=place).replace_schema_metadata(None)

    def _rejected_whole(self, work: PartWork, key: str) -> PartDone | None:
        """Return a part of which an earlier attempt found that no row can be embedded."""
        rejected = self._read_rejected(work.number, key, left="0") if work.kind == "embed" else None
        return None if rejected is None else self._done(work, self.columns.empty_table(), None, rejected=rejected, skipped=True)


def distinct(hashes: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where each text stands first, and for every row the number of its text."""
    codes = _whole(hashes).dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    return first, codes.astype(np.int64)


def with_vectors(rows: pa.Table, vectors: pa.Array, failed: Mapping[int, tuple[str, str]]) -> tuple[pa.Table, pa.Table]:
    """Give every row the vector of its text; rows whose text failed (reason, text) come back as quarantine records."""
    _, codes = distinct(rows.column(TEXT_HASH))
    bad = np.isin(codes, [*failed])
    good = rows.filter(pa.array(~bad)).append_column(VECTOR, vectors.take(pa.array(codes[~bad])))
    lost = rows.filter(pa.array(bad))
    found = [failed[number] for number in codes[bad].tolist()]
    columns = [
        lost.column(SHARD),
        lost.column(ROW),
        lost.column(ID),
        pa.repeat(STAGE_NAME, len(found)),
        pa.array([reason for reason, _ in found], pa.string()),
        pa.repeat(RENDERED, len(found)),
        pa.array([text.encode()[:_EXCERPT_BYTES] for _, text in found], pa.binary()),
    ]
    return good, pa.Table.from_arrays(columns, schema=QUARANTINE)


def copied(rows: pa.Table, vectors: pa.Table, columns: pa.Schema) -> pa.Table:
    """Give every row the vector that is known for its text."""
    places = pc.index_in(_whole(rows.column(TEXT_HASH)), _whole(vectors.column(TEXT_HASH)))
    if places.null_count:
        raise PlanError(f"{places.null_count} of {rows.num_rows} texts to copy have no vector any more. Plan again.")
    values = _whole(vectors.column(VECTOR)).take(places)
    return rows.append_column(VECTOR, values.cast(columns.field(VECTOR).type))


def without_vectors(rows: pa.Table, columns: pa.Schema) -> pa.Table:
    """Fill the columns that these rows do not have with null: the vector, and for a delete all but the id."""
    given = set(rows.schema.names)
    return pa.table([rows.column(f.name) if f.name in given else pa.nulls(rows.num_rows, f.type) for f in columns], names=columns.names)


def ipc(table: pa.Table) -> bytes:
    """Fold a table into bytes: one value, which nothing on the way splits or merges."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_ipc(data: bytes | pa.Buffer) -> pa.Table:
    """Give back what `ipc` folded."""
    return pa.ipc.open_stream(data).read_all()


def _whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if isinstance(column, pa.Array):
        return column
    return (
        column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    )
