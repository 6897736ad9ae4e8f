"""The product, as the pipeline knows it after normalising: the only place where its columns are named and typed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.errors import InputError

ID = "id"
LOCALE = "locale"
ATTRIBUTES = "attributes"
UPDATED_AT = "updated_at"
DELETED = "deleted"

# What `diff` reads and writes. Hashes travel as 16 fixed bytes, so that memory follows rows and not id lengths.
ID_HASH = "id_hash"
TEXT_HASH = "text_hash"
ATTR_HASH = "attr_hash"
STATE = "state"
TEXT_BYTES = "text_bytes"
ACTION = "action"

# What the vector log and the table hold beside them. `vid` is the number under which FAISS knows a product.
RENDERED = "text"
VECTOR = "vector"
VID = "vid"

# Rejected rows.
SHARD = "shard"
ROW = "row"
STAGE = "stage"
REASON = "reason"
FIELD = "field"
EXCERPT = "excerpt"

# A source sets this to the bytes of a line that it could not parse; every other column of that row is then null.
MALFORMED = "_malformed"

HASH = pa.binary(16)
TIMESTAMP = pa.timestamp("us", tz="UTC")
ATTRIBUTE_MAP = pa.map_(pa.string(), pa.string())

# Filter column types that a configuration may name. Money and measures are float64: exact comparison is by bits.
FILTER_TYPES: Mapping[str, pa.DataType] = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": TIMESTAMP,
}

# What a search puts beside the columns of the table: the table engine's names, and ours.
FOUND = frozenset({"score", "_distance", "_score", "_rowid", "_rowaddr"})
RESERVED = FOUND | {
    ID,
    LOCALE,
    ATTRIBUTES,
    UPDATED_AT,
    DELETED,
    ID_HASH,
    TEXT_HASH,
    ATTR_HASH,
    STATE,
    TEXT_BYTES,
    ACTION,
    VECTOR,
    VID,
    SHARD,
    ROW,
}


# What a row asks for: keep the product, remove it, or neither can be trusted.
LIVE, TOMBSTONE, REJECTED = 0, 1, 2

# What becomes of a product. `text` includes a change of attributes in the same night.
ADD, TEXT, ATTR, DELETE = "add", "text", "attr", "delete"
ACTIONS = (ADD, TEXT, ATTR, DELETE)

# The published state, and the catalog as scanned: the two sides of the diff.
PUBLISHED = pa.schema([(ID_HASH, HASH), (TEXT_HASH, HASH), (ATTR_HASH, HASH), (ID, pa.string())])
SCANNED = pa.schema(
    [
        *PUBLISHED,
        (STATE, pa.int8()),
        (UPDATED_AT, TIMESTAMP),
        (TEXT_BYTES, pa.int32()),
        (SHARD, pa.string()),
        (ROW, pa.int64()),
    ]
)

# A plan's changes, each with the row of the source that carries it; what goes has no row.
CHANGES = pa.schema(
    [
        (ID, pa.string()),
        (ID_HASH, HASH),
        (ACTION, pa.string()),
        (TEXT_HASH, HASH),
        (ATTR_HASH, HASH),
        (TEXT_BYTES, pa.int32()),
        (SHARD, pa.string()),
        (ROW, pa.int64()),
    ]
)

# How a vector's numbers are kept, in the log and in the table.
VECTOR_TYPES: Mapping[str, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16()}

# The vector indexes that the table may have; `auto` chooses by its size.
VECTOR_INDEXES = ("auto", "none", "IVF_FLAT", "IVF_SQ", "IVF_PQ", "IVF_RQ", "IVF_HNSW_FLAT", "IVF_HNSW_SQ", "IVF_HNSW_PQ")


@dataclass(frozen=True, kw_only=True)
class ProductSchema:
    """Which text fields and typed filter columns a normalised product has. A name may be both (brand often is)."""

    text: tuple[str, ...]
    filters: Mapping[str, str] = field(default_factory=dict)
    attributes: bool = True

    def __post_init__(self) -> None:
        for name in (*self.text, *self.filters):
            if name in RESERVED:
                raise InputError(f"`{name}` is a reserved column and cannot be a text field or a filter. Rename it in `source.columns`.")
        for name, kind in self.filters.items():
            if kind not in FILTER_TYPES:
                raise InputError(f"filter `{name}` has unknown type `{kind}`. Use one of: {', '.join(FILTER_TYPES)}.")
            if name in self.text and kind != "string":
                raise InputError(f"`{name}` is used in the template, so its filter type must be `string`, not `{kind}`.")

    @property
    def fields(self) -> tuple[str, ...]:
        """Every configurable column once: text fields in template order, then the other filters."""
        return (*self.text, *(name for name in self.filters if name not in self.text))

    def type_of(self, name: str) -> pa.DataType:
        """Return the Arrow type of a text field or filter column."""
        return pa.string() if name in self.text else FILTER_TYPES[self.filters[name]]

    @property
    def arrow(self) -> pa.Schema:
        """The normalised table, column by column, in its fixed order."""
        columns = [pa.field(ID, pa.string(), nullable=False), pa.field(LOCALE, pa.string(), nullable=False)]
        columns += [pa.field(name, self.type_of(name)) for name in self.fields]
        if self.attributes:
            columns.append(pa.field(ATTRIBUTES, ATTRIBUTE_MAP))
        columns += [pa.field(UPDATED_AT, TIMESTAMP), pa.field(DELETED, pa.bool_(), nullable=False)]
        return pa.schema(columns)

    def kept(self) -> list[pa.Field]:
        """Return the columns that stay beside the vector: locale, then the filter columns in the order of the configuration."""
        return [pa.field(LOCALE, pa.string()), *(pa.field(name, FILTER_TYPES[kind]) for name, kind in self.filters.items())]

    @property
    def digest(self) -> str:
        """Hash of every column's name and type, in order."""
        return hashlib.sha256("\n".join(f"{column.name}:{column.type}" for column in self.arrow).encode()).hexdigest()


QUARANTINE = pa.schema(
    [
        pa.field(SHARD, pa.string(), nullable=False),
        pa.field(ROW, pa.int64(), nullable=False),
        pa.field(ID, pa.string()),
        pa.field(STAGE, pa.string(), nullable=False),
        pa.field(REASON, pa.string(), nullable=False),
        pa.field(FIELD, pa.string(), nullable=False),
        pa.field(EXCERPT, pa.binary(), nullable=False),
    ]
)


def part_schema(schema: ProductSchema, *, dims: int, vector: str) -> pa.Schema:
    """Return the columns of the vector log. `attr` rows have no vector, it did not change; `delete` rows have an id alone."""
    return pa.schema(
        [
            pa.field(ID, pa.string(), nullable=False),
            pa.field(ID_HASH, HASH, nullable=False),
            pa.field(ACTION, pa.string(), nullable=False),
            pa.field(TEXT_HASH, HASH),
            pa.field(ATTR_HASH, HASH),
            *schema.kept(),
            pa.field(VECTOR, pa.list_(VECTOR_TYPES[vector], dims)),
        ]
    )


def table_schema(schema: ProductSchema, *, dims: int, vector: str) -> pa.Schema:
    """Return the columns of the table: one row for each live product."""
    return pa.schema(
        [
            pa.field(ID, pa.string(), nullable=False),
            pa.field(ID_HASH, HASH, nullable=False),
            pa.field(VID, pa.int64(), nullable=False),
            pa.field(TEXT_HASH, HASH, nullable=False),
            pa.field(ATTR_HASH, HASH, nullable=False),
            *schema.kept(),
            pa.field(VECTOR, pa.list_(VECTOR_TYPES[vector], dims), nullable=False),
        ]
    )
