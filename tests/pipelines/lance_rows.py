"""Rows for the tests of the Lance table: a schema with one column of every filter type, and products made from numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.hashes import id_hashes, text_hashes, vids
from pipelines.schema import ID, ID_HASH, TIMESTAMP, VECTOR, ProductSchema, table_schema
from pipelines.storage import Store
from pipelines.stores.lance import TableSpec

DIMS = 32
BRANDS = ("Acme", "O'Hara", 'Quo"te', None, "東京の靴", "Größe & Co", "-- drop")
PRODUCTS = ProductSchema(
    text=("title",), filters={"brand": "string", "price": "float", "stock": "bool", "pieces": "int", "listed": "timestamp"}
)


def spec_of(**how: Any) -> TableSpec:
    """Return a spec over every filter column, for tables of a few hundred rows."""
    vector = how.pop("vector", "float32")
    defaults: dict[str, Any] = {"scalar": ("brand", "price", "stock", "pieces", "listed"), "text": ("brand",), "flat_below": 500}
    return TableSpec(schema=table_schema(PRODUCTS, dims=DIMS, vector=vector), **(defaults | how))


def product(name: str, *, text: int = 0, attr: int = 0) -> dict[str, Any]:
    """Return one row; its text number decides the vector, its attribute number the kept columns."""
    draw = np.random.default_rng([text, *name.encode()])
    vector = draw.standard_normal(DIMS).astype(np.float32)
    other = np.random.default_rng([attr, 7, *name.encode()])
    return {
        ID: name,
        "text_hash": text_hashes(pa.array([f"{name} {text}"]))[0].as_py(),
        "attr_hash": text_hashes(pa.array([f"attr {name} {attr}"]))[0].as_py(),
        "locale": "de" if other.random() < 0.3 else "en",
        "brand": BRANDS[int(other.integers(len(BRANDS)))],
        "price": None if other.random() < 0.1 else round(float(other.random()) * 100, 2),
        "stock": None if other.random() < 0.1 else bool(other.random() < 0.5),
        "pieces": None if other.random() < 0.1 else int(other.integers(-3, 9)),
        "listed": None if other.random() < 0.1 else datetime(2026, 1, 1 + int(other.integers(28)), tzinfo=UTC),
        VECTOR: vector / np.linalg.norm(vector),
    }


def rows(products: Sequence[Mapping[str, Any]], spec: TableSpec) -> pa.Table:
    """Return products as the table's columns."""
    ids = pa.array([item[ID] for item in products], pa.string())
    hashes = id_hashes(ids)
    made = {ID: ids, ID_HASH: hashes, "vid": pa.array(vids(hashes))}
    for field in spec.schema:
        if field.name == VECTOR:
            flat = np.concatenate([item[VECTOR] for item in products]) if products else np.zeros(0)
            values = pa.array(flat.astype(field.type.value_type.to_pandas_dtype()))
            made[VECTOR] = pa.FixedSizeListArray.from_arrays(values, DIMS)
        elif field.name not in made:
            made[field.name] = pa.array([item[field.name] for item in products], field.type)
    return pa.table([made[name] for name in spec.schema.names], schema=spec.schema)


def many(names: Sequence[str], spec: TableSpec) -> pa.Table:
    """Return fresh products of these names."""
    return rows([product(name) for name in names], spec)


def bulk(number: int, spec: TableSpec) -> pa.Table:
    """Return many products quickly: random vectors, few distinct attributes."""
    draw = np.random.default_rng(number)
    ids = pa.array([f"bulk-{index}" for index in range(number)])
    hashes = id_hashes(ids)
    vectors = draw.standard_normal((number, DIMS), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    columns = [
        ids,
        hashes,
        pa.array(vids(hashes)),
        hashes,
        hashes,
        pa.array(["en"] * number),
        pa.array([f"brand {index % 50}" for index in range(number)]),
        pa.array(draw.random(number)),
        pa.array(draw.random(number) < 0.5),
        pa.array(draw.integers(0, 99, number)),
        pa.nulls(number, TIMESTAMP),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMS),
    ]
    return pa.table(columns, schema=spec.schema)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a test keeps its table."""

    store: Store
    options: Mapping[str, str]
    key: str = "tables/0123456789abcdef.lance"

    @property
    def uri(self) -> str:
        """The table's address."""
        return self.store.uri(self.key)


def local(folder: Path) -> Place:
    """Return a place on disk."""
    return Place(store=Store.open(folder / "store"), options={})


def remote(s3: Any) -> Place:
    """Return a place in a fresh bucket."""
    return Place(store=Store.open(f"s3://{s3.bucket()}/store", options=s3.options), options=s3.options)
