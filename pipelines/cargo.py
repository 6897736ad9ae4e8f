"""What travels between the stages that embed: one row for each part, so that nothing on the way splits or merges parts.

Texts, ids and vectors are Arrow or plain bytes: no stage makes a Python object of a row, except the strings of texts that
the actor tokenises itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from encoder.tokens import Tokens
from pipelines.careful import Batch
from pipelines.parts import ipc

# `tokens` has the ids of every text where they were made ahead, and is null where the actor makes them.
CARGO = pa.schema(
    [
        ("index", pa.int64()),
        ("done", pa.large_binary()),
        ("rows", pa.large_binary()),
        ("texts", pa.large_list(pa.string())),
        ("tokens", pa.large_list(pa.large_list(pa.int32()))),
        ("vectors", pa.large_binary()),
        ("facts", pa.string()),
    ]
)


def finished(index: int, done: bytes) -> pa.Table:
    """Return the cargo of a part that needs nothing more."""
    return _row(index=pa.array([index]), done=_bytes(done))


def to_embed(index: int, rows: pa.Table, texts: pa.StringArray, tokens: Tokens | None, facts: Mapping[str, Any]) -> pa.Table:
    """Return the cargo of a part whose texts want vectors."""
    given = {} if tokens is None else {"tokens": _one(tokens.to_arrow())}
    return _row(index=pa.array([index]), rows=_bytes(ipc(rows)), texts=_one(texts), facts=pa.array([json.dumps(facts)]), **given)


def batch_of(cargo: pa.Table) -> Batch:
    """Return what is to be embedded: ids where the cargo has them, and texts elsewhere."""
    tokens = cargo.column("tokens")[0]
    if tokens.is_valid:
        return Tokens.from_arrow(tokens.values)
    texts: list[str] = cargo.column("texts")[0].as_py()
    return texts


def text_of(cargo: pa.Table, number: int) -> str:
    """Return one of the texts."""
    text: str = cargo.column("texts")[0].values[number].as_py()
    return text


def facts_of(cargo: pa.Table) -> dict[str, Any]:
    """Return what is known of the part."""
    facts: dict[str, Any] = json.loads(cargo.column("facts")[0].as_py())
    return facts


def embedded(cargo: pa.Table, vectors: npt.NDArray[np.float32], facts: Mapping[str, Any]) -> pa.Table:
    """Return the cargo with vectors in place of the texts; neither rows nor vectors are copied."""
    kept = {name: cargo.column(name) for name in ("index", "rows")}
    return _row(**kept, vectors=_bytes(np.ascontiguousarray(vectors).reshape(-1).view(np.uint8)), facts=pa.array([json.dumps(facts)]))


def _row(**columns: pa.Array | pa.ChunkedArray) -> pa.Table:
    given = [columns[field.name] if field.name in columns else pa.nulls(1, field.type) for field in CARGO]
    return pa.Table.from_arrays(given, schema=CARGO)


def _bytes(data: bytes | npt.NDArray[np.uint8]) -> pa.Array:
    """Return one value over these bytes, without a copy."""
    buffer = pa.py_buffer(data)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, buffer.size], np.int64)), buffer])


def _one(values: pa.Array) -> pa.LargeListArray:
    """Return one value that is the list of all of these."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)
