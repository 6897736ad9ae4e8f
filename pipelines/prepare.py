"""One batch of source rows made ready for the diff: normalised, rendered, hashed. Pure, so any worker may do it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.hashes import attr_hashes, id_hashes, text_hashes
from pipelines.normalize import NormalizeOptions, normalize
from pipelines.normalize.moments import update_times
from pipelines.schema import (
    ATTR_HASH,
    DELETED,
    FIELD,
    HASH,
    ID,
    ID_HASH,
    LIVE,
    QUARANTINE,
    REJECTED,
    ROW,
    SCANNED,
    SHARD,
    STATE,
    TEXT_HASH,
    TOMBSTONE,
    UPDATED_AT,
    ProductSchema,
)
from pipelines.text import Template, estimate_tokens, render

EMPTY_TEXT = "empty_text"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch, ready: `rows` as SCANNED has them, rejects as QUARANTINE has them, and what was counted on the way.

    `sample_tokens` and `sample_bytes` come from one text in sixteen, chosen by the hash of its id.
    """

    rows: pa.Table
    rejected: pa.Table
    repaired: Mapping[str, int]
    rows_in: int
    sample_tokens: int
    sample_bytes: int

    def pack(self) -> pa.Table:
        """Fold the batch into one row, whose columns are lists of structs: the buffers stay as they are."""
        columns = {
            "rows": _folded(self.rows),
            "rejected": _folded(self.rejected),
            "repaired": pa.array([sorted(self.repaired.items())], pa.map_(pa.string(), pa.int64())),
            "counts": pa.array([[self.rows_in, self.sample_tokens, self.sample_bytes]], pa.list_(pa.int64())),
        }
        return pa.table(columns)

    @staticmethod
    def unpack(table: pa.Table) -> Iterator[Prepared]:
        """Give back the batches that `pack` folded, one for each row of the table."""
        for batch in table.to_batches():
            for index in range(batch.num_rows):
                rows_in, tokens, size = batch.column("counts")[index].as_py()
                yield Prepared(
                    rows=_unfolded(batch.column("rows"), index, SCANNED),
                    rejected=_unfolded(batch.column("rejected"), index, QUARANTINE),
                    repaired=dict(batch.column("repaired")[index].as_py()),
                    rows_in=rows_in,
                    sample_tokens=tokens,
                    sample_bytes=size,
                )


def _folded(table: pa.Table) -> pa.ListArray:
    structs = table.to_struct_array().combine_chunks()
    return pa.ListArray.from_arrays(pa.array([0, len(structs)], pa.int32()), structs)


def _unfolded(column: pa.ListArray, index: int, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_struct_array(column[index].values).cast(schema)


@dataclass(frozen=True, kw_only=True)
class Preparer:
    """Makes batches ready. Picklable: it travels to the workers once, with the shards."""

    normalizing: NormalizeOptions
    template: Template

    def __call__(self, batch: pa.RecordBatch, *, shard: str, first_row: int) -> Prepared:
        """Prepare one batch; every input row ends in `rows` or in `rejected`, or in both where its id is still good."""
        normal = normalize(batch, self.normalizing, shard=shard, first_row=first_row)
        products, rejected = normal.products, normal.rejected
        numbers = np.setdiff1d(np.arange(first_row, first_row + normal.rows_in), rejected.column(ROW).to_numpy(), assume_unique=True)
        texts = render(self.template, products)
        gone = products.column(DELETED).combine_chunks()
        empty = pc.and_not(pc.equal(pc.binary_length(texts), 0), gone)
        rejected = pa.concat_tables([rejected, _empty_text(products, numbers, empty, shard)])

        ids = products.column(ID).combine_chunks()
        hashes = id_hashes(ids)
        states = pc.if_else(gone, TOMBSTONE, pc.if_else(empty, REJECTED, LIVE)).cast(pa.int8())
        rows = pa.Table.from_arrays(
            [
                hashes,
                text_hashes(texts),
                attr_hashes(products, self.normalizing.schema),
                ids,
                states,
                products.column(UPDATED_AT),
                pc.binary_length(texts).cast(pa.int32()),
                pa.repeat(shard, len(ids)),
                pa.array(numbers, pa.int64()),
            ],
            schema=SCANNED,
        )
        sample = texts.filter(_sampled(hashes))
        return Prepared(
            rows=pa.concat_tables([rows, self._still_named(normal.rejected, batch, first_row)]),
            rejected=rejected,
            repaired=normal.repaired,
            rows_in=normal.rows_in,
            sample_tokens=int(estimate_tokens(sample).sum()),
            sample_bytes=pc.sum(pc.binary_length(sample)).as_py() or 0,
        )

    def _still_named(self, rejected: pa.Table, batch: pa.RecordBatch, first_row: int) -> pa.Table:
        """Return rejected rows whose id is good: the diff must know that the product cannot stay as it was."""
        named = rejected.filter(pc.and_(pc.is_valid(rejected.column(ID)), pc.not_equal(rejected.column(FIELD), ID)))
        ids = named.column(ID).combine_chunks()
        filled = {ID: ids, ID_HASH: id_hashes(ids), SHARD: named.column(SHARD), ROW: named.column(ROW)}
        filled[STATE] = pa.repeat(pa.scalar(REJECTED, pa.int8()), len(ids))
        if UPDATED_AT in batch.schema.names and len(ids):
            raw = batch.column(UPDATED_AT).take(pc.subtract(named.column(ROW), first_row).combine_chunks())
            options = self.normalizing
            filled[UPDATED_AT] = update_times(raw, now=options.now, skew_s=options.clock_skew_s, repaired=Counter())
        return pa.Table.from_arrays([filled.get(field.name, pa.nulls(len(ids), field.type)) for field in SCANNED], schema=SCANNED)

    def rendered(self, batch: pa.RecordBatch, *, shard: str) -> tuple[pa.Table, pa.StringArray]:
        """Return live products as the vector log keeps them, and their texts: the values whose hashes `__call__` gave."""
        schema = self.normalizing.schema
        products = normalize(batch, self.normalizing, shard=shard).products
        products = products.filter(pc.invert(products.column(DELETED))).combine_chunks()
        texts = render(self.template, products)
        ids = products.column(ID).combine_chunks()
        columns = {ID: ids, ID_HASH: id_hashes(ids), TEXT_HASH: text_hashes(texts), ATTR_HASH: attr_hashes(products, schema)}
        return pa.table(columns | {field.name: products.column(field.name) for field in schema.kept()}), texts

    def packed(self, batch: pa.RecordBatch, *, shard: str, first_row: int) -> pa.Table:
        """Prepare a batch and fold it, as workers send it."""
        return self(batch, shard=shard, first_row=first_row).pack()


@dataclass(frozen=True, kw_only=True)
class PresentIds:
    """Reads ids alone: which products a source holds and does not call deleted. Picklable, as `Preparer`."""

    normalizing: NormalizeOptions

    def __call__(self, batch: pa.RecordBatch, *, shard: str, first_row: int) -> pa.Table:
        """Return the id hashes of the batch's live rows."""
        ids_only = replace(self.normalizing, schema=ProductSchema(text=(), attributes=False), non_negative=None)
        products = normalize(batch, ids_only, shard=shard, first_row=first_row).products
        live = products.filter(pc.invert(products.column(DELETED)))
        return pa.table({ID_HASH: id_hashes(live.column(ID).combine_chunks())})


@dataclass(frozen=True, kw_only=True)
class TextsOf:
    """Renders a few products, by id: what a person wants to see of a plan. Picklable, as `Preparer`."""

    normalizing: NormalizeOptions
    template: Template
    ids: tuple[str, ...]

    def __call__(self, batch: pa.RecordBatch, *, shard: str, first_row: int) -> pa.Table:
        """Return id and text of the batch's live products that were asked for."""
        products = normalize(batch, self.normalizing, shard=shard, first_row=first_row).products
        wanted = pc.is_in(products.column(ID), pa.array(self.ids, pa.string()))
        chosen = products.filter(pc.and_not(wanted, products.column(DELETED)))
        return pa.table({ID: chosen.column(ID), "text": render(self.template, chosen.combine_chunks())})


def _empty_text(products: pa.Table, numbers: np.ndarray, empty: pa.BooleanArray, shard: str) -> pa.Table:
    """Quarantine live products that the template renders to nothing."""
    ids = products.column(ID).filter(empty).combine_chunks()
    count = len(ids)
    columns = [
        pa.repeat(shard, count),
        pa.array(numbers[empty.to_numpy(zero_copy_only=False)], pa.int64()),
        ids,
        *(pa.repeat(word, count) for word in ("render", EMPTY_TEXT, "text")),
        pa.repeat(pa.scalar(b"", pa.binary()), count),
    ]
    return pa.Table.from_arrays(columns, schema=QUARANTINE)


def _sampled(hashes: pa.FixedSizeBinaryArray) -> pa.BooleanArray:
    """Choose one row in sixteen by its hash, so that the choice is the same in every batch and order."""
    first = np.frombuffer(hashes.buffers()[1], dtype=np.uint8)[hashes.offset * HASH.byte_width :: HASH.byte_width][: len(hashes)]
    return pa.array(first % 16 == 0)
