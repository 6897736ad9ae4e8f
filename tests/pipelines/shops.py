"""The same little shop, kept in every kind of source: what the behaviour suite writes, reads back and changes."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipelines.sources import SourceSpec

SCHEMA = pa.schema(
    [
        pa.field("sku", pa.string()),
        pa.field("name", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("price", pa.float64()),
        pa.field("modified_at", pa.timestamp("us", "UTC")),
        pa.field("live", pa.bool_()),
        pa.field("attr_color", pa.string()),
        pa.field("attr_size", pa.string()),
        pa.field("unmapped", pa.string()),
    ]
)


def product(sku: str, *, day: int | None = 1, name: str | None = "shoe", live: bool = True) -> dict[str, Any]:
    """Return one row of the shop; `day` is a day of January 2024."""
    return {
        "sku": sku,
        "name": name,
        "brand": "Acme",
        "price": 9.5,
        "modified_at": None if day is None else datetime(2024, 1, day, 12, tzinfo=UTC),
        "live": live,
        "attr_color": "red",
        "attr_size": None,
        "unmapped": "x",
    }


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return rows as the shop's table."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


@dataclass(frozen=True, kw_only=True)
class Shop:
    """One implementation: `write` replaces everything by these parts, and `spec` says how to read it."""

    write: Callable[[Sequence[pa.Table]], None]
    spec: Callable[..., SourceSpec]
    after_move: str = "refused"


def as_csv(rows: pa.Table) -> bytes:
    """Return CSV as exporters write it: text is quoted, so that empty text and null differ."""
    sink = BytesIO()
    pa.csv.write_csv(rows, sink)
    return sink.getvalue()


def as_jsonl(rows: pa.Table) -> bytes:
    """Return JSON Lines; times are ISO 8601."""
    return "".join(json.dumps(row, ensure_ascii=False, default=lambda value: value.isoformat()) + "\n" for row in rows.to_pylist()).encode()


def as_parquet(rows: pa.Table) -> bytes:
    """Return a Parquet file."""
    sink = BytesIO()
    pq.write_table(rows, sink)
    return sink.getvalue()


def _zstd(data: bytes) -> bytes:
    # Arrow's one-shot codec writes a frame with its size in it; an exporter's stream does not.
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


_ENCODERS: dict[str, Callable[[pa.Table], bytes]] = {
    "parquet": as_parquet,
    "csv": as_csv,
    "jsonl": as_jsonl,
    "csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "jsonl.zst": lambda rows: _zstd(as_jsonl(rows)),
}


def local(kind: str, tmp_path: Path) -> Shop:
    """Keep the shop in a folder of files."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "_SUCCESS").write_bytes(b"")

    def write(parts: Sequence[pa.Table]) -> None:
        for number, part in enumerate(parts):
            (folder / f"part-{number}.{kind}").write_bytes(_ENCODERS[kind](part))

    return Shop(write=write, spec=lambda **more: SourceSpec(type=kind.split(".", maxsplit=1)[0], path=str(folder), **more))


def bucket(kind: str, s3: Any) -> Shop:
    """Keep the shop in a bucket."""
    client, name = s3.client(), s3.bucket()

    def write(parts: Sequence[pa.Table]) -> None:
        client.put_object(Bucket=name, Key="shop/_SUCCESS", Body=b"")
        for number, part in enumerate(parts):
            client.put_object(Bucket=name, Key=f"shop/part {number}.{kind}", Body=_ENCODERS[kind](part))

    return Shop(write=write, spec=lambda **more: SourceSpec(type=kind, path=f"s3://{name}/shop/", options=s3.options, **more))


def lance_table(tmp_path: Path) -> Shop:
    """Keep the shop in a Lance table, one fragment for each part."""
    import lance

    path = str(tmp_path / "shop.lance")

    def write(parts: Sequence[pa.Table]) -> None:
        for number, part in enumerate(parts):
            lance.write_dataset(part, path, mode="append" if number else "overwrite")

    return Shop(write=write, spec=lambda **more: SourceSpec(type="lance", path=path, **more), after_move="pinned rows")


def delta_table(tmp_path: Path) -> Shop:
    """Keep the shop in a Delta table, partitioned by brand."""
    import deltalake

    path = str(tmp_path / "shop-delta")

    def write(parts: Sequence[pa.Table]) -> None:
        for number, part in enumerate(parts):
            deltalake.write_deltalake(path, part, mode="append" if number else "overwrite", partition_by=["brand"])

    return Shop(write=write, spec=lambda **more: SourceSpec(type="delta", path=path, **more), after_move="pinned rows")


def database(driver: Any, connect_to: str, uri: str) -> Shop:
    """Keep the shop in a table of a database."""
    name = f"shop_{uuid.uuid4().hex[:8]}"

    def write(parts: Sequence[pa.Table]) -> None:
        with driver.connect(connect_to) as connection, connection.cursor() as cursor:
            for number, part in enumerate(parts):
                cursor.adbc_ingest(name, part, mode="append" if number else "replace")
            connection.commit()

    return Shop(write=write, spec=lambda **more: SourceSpec(type="sql", uri=uri, table=name, **more), after_move="anything")


def memory() -> Shop:
    """Keep the shop in memory."""
    held: list[pa.Table] = []

    def write(parts: Sequence[pa.Table]) -> None:
        held[:] = [pa.concat_tables(parts)]

    return Shop(write=write, spec=lambda **more: SourceSpec(type="memory", data=held[0], **more), after_move="pinned rows")
