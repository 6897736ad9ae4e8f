"""The vector log: any reader opens it, a changed byte is noticed, and the table can be rebuilt from it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines.errors import CorruptObject, InputError, ManifestError
from pipelines.hashes import id_hashes, text_hashes, vids
from pipelines.manifest import ManifestObject
from pipelines.schema import (
    ACTION,
    ADD,
    ATTR,
    ATTR_HASH,
    DELETE,
    HASH,
    ID,
    ID_HASH,
    TEXT,
    TEXT_HASH,
    VECTOR,
    VID,
    part_schema,
    table_schema,
)
from pipelines.storage import Store
from pipelines.stores.parquet import (
    CONTENT,
    FINGERPRINT,
    KIND,
    decode,
    export,
    metadata_of,
    paid_texts,
    read_part,
    replay,
    vectors_in,
    write_part,
)
from tests.embedding import DIMS, SCHEMA, matrix, word_vectors

Row = tuple[str, str, str | None, float | None]
"""id, action, text (what its vector is made of), price"""


def part(rows: Sequence[Row], *, vector: str = "float32", whole: bool = True) -> pa.Table:
    """Return rows as a part has them; those of a `whole` part have vectors, except deletes."""
    columns = part_schema(SCHEMA, dims=DIMS, vector=vector)
    ids, actions, texts, prices = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], [row[3] for row in rows]
    known: list[str] = [text or "" for text in texts]
    values = word_vectors(known).astype(vector).tolist() if rows else []
    live = pa.array([action != DELETE for action in actions], pa.bool_())
    given = {
        ID: pa.array(ids, pa.string()),
        ID_HASH: id_hashes(pa.array(ids, pa.string())),
        ACTION: pa.array(actions, pa.string()),
        TEXT_HASH: pc.if_else(live, text_hashes(pa.array(known, pa.string())), pa.scalar(None, HASH)),
        ATTR_HASH: pc.if_else(live, text_hashes(pa.array([str(price) for price in prices], pa.string())), pa.scalar(None, HASH)),
        "price": pa.array(prices, pa.float64()),
        VECTOR: pa.array(
            [value if whole and action != DELETE else None for value, action in zip(values, actions, strict=True)],
            columns.field(VECTOR).type,
        ),
    }
    return pa.table([given.get(field.name, pa.nulls(len(rows), field.type)) for field in columns], schema=columns)


def stored(store: Store, number: int, table: pa.Table, *, kind: str = "embed", run: str = "r1", **said: str) -> ManifestObject:
    data = write_part(table, metadata={KIND: kind, FINGERPRINT: "f", VECTOR: "float32", **said})
    return ManifestObject.of(store.put(f"vectors/{run}/part-{number:05d}.parquet", data), role="vectors", rows=table.num_rows)


ROWS: list[Row] = [(f"p{number}", ADD, f"text {number}", float(number)) for number in range(500)]


@pytest.mark.parametrize("vector", ["float32", "float16"])
def test_bytes_follow_the_rows_and_not_their_order(vector: str) -> None:
    table = part(ROWS, vector=vector)
    data = write_part(table, metadata={CONTENT: "k", KIND: "embed"})
    turned = pa.concat_tables([table.slice(300), table.slice(0, 300)])
    assert data == write_part(turned, metadata={KIND: "embed", CONTENT: "k"})
    again = decode(data, where="part")
    assert again.column(ID_HASH).to_pylist() == sorted(again.column(ID_HASH).to_pylist())
    assert again.replace_schema_metadata(None).sort_by(ID) == table.sort_by(ID)
    assert metadata_of(data, where="part") == {CONTENT: "k", KIND: "embed"}


@pytest.mark.parametrize("vector", ["float32", "float16"])
def test_polars_duckdb_pandas_and_pyarrow_read_it_without_us(tmp_path: Path, vector: str) -> None:
    import duckdb
    import pandas as pd
    import polars as pl
    import pyarrow.parquet as pq

    table = part([*ROWS, ("gone", DELETE, None, None)], vector=vector)
    path = tmp_path / "part.parquet"
    path.write_bytes(write_part(table, metadata={}))
    expected = word_vectors(["text 7"]).astype(vector)[0].astype(np.float32)
    frames: dict[str, tuple[Any, float, int]] = {}
    polars = pl.read_parquet(path)
    row = polars.filter(pl.col("id") == "p7")
    frames["polars"] = (row["vector"][0].to_list(), row["price"][0], polars["vector"].null_count())
    with duckdb.connect() as db:
        found = db.execute("SELECT vector, price FROM read_parquet(?) WHERE id = 'p7'", [str(path)]).fetchall()[0]
        empty = db.execute("SELECT count(*) FROM read_parquet(?) WHERE vector IS NULL", [str(path)]).fetchall()[0][0]
    frames["duckdb"] = (*found, empty)
    pandas = pd.read_parquet(path)
    one = pandas[pandas["id"] == "p7"].iloc[0]
    frames["pandas"] = (one["vector"], one["price"], pandas["vector"].isna().sum())
    arrow = pq.read_table(path)
    line = arrow.filter(pc.equal(arrow["id"], "p7")).to_pylist()[0]
    frames["pyarrow"] = (line["vector"], line["price"], arrow["vector"].null_count)
    for name, (values, price, nulls) in frames.items():
        np.testing.assert_array_equal(np.asarray(values, np.float32), expected, err_msg=name)
        assert (price, nulls) == (7.0, 1), name


def test_no_changed_bit_passes_unnoticed(tmp_path: Path) -> None:
    table = part(ROWS)
    data = write_part(table, metadata={CONTENT: "k"})
    whole = decode(data, where="part")
    draws = random.Random(5)
    silent = 0
    for _ in range(200):
        torn = bytearray(data)
        torn[draws.randrange(len(torn))] ^= 1 << draws.randrange(8)
        try:
            silent += decode(bytes(torn), where="part") != whole
        except CorruptObject:
            continue
        except Exception as error:  # noqa: BLE001  a broken footer may fail anywhere in Arrow
            assert "arrow" in type(error).__module__ or isinstance(error, OSError | UnicodeDecodeError)  # noqa: PT017
    assert silent == 0
    store = Store.open(tmp_path)
    item = stored(store, 0, table)
    Path(store.uri(item.key)).write_bytes(data[:-1] + b"?")
    with pytest.raises(CorruptObject):
        read_part(store, item)


def naive(log: Sequence[tuple[bool, Sequence[Row]]]) -> Mapping[str, tuple[str, float | None]]:
    """Replay a log row by row: what each product's vector is made of, and its price."""
    state: dict[str, tuple[str, float | None]] = {}
    for _, rows in log:
        for name, action, text, price in rows:
            if action == DELETE:
                state.pop(name, None)
            else:
                state[name] = (str(text), price)
    return state


def random_log(draws: random.Random) -> list[tuple[bool, list[Row]]]:
    """Return parts, with whether they have vectors, in which products come, change their text or price, and go."""
    texts: dict[str, str] = {}
    log: list[tuple[bool, list[Row]]] = []
    for number in range(draws.randrange(1, 12)):
        kind = draws.choice(["whole", "attr", "delete"]) if texts else "whole"
        names = [f"p{name}" for name in draws.sample(range(12), draws.randrange(1, 8))]
        rows: list[Row] = []
        for name in names:
            if kind == "whole":
                # A rewritten table copies vectors for changed attributes, so such a part has `attr` rows too.
                action = ADD if name not in texts else draws.choice([TEXT, ATTR])
                texts[name] = texts[name] if action == ATTR else f"text {name} {number}"
                rows.append((name, action, texts[name], draws.random()))
            elif name in texts:
                rows.append((name, ATTR, texts[name], draws.random()) if kind == "attr" else (name, DELETE, None, None))
                if kind == "delete":
                    del texts[name]
        if rows:
            log.append((kind == "whole", rows))
    return log


@pytest.mark.parametrize("seed", range(40))
def test_replay_equals_a_replay_row_by_row(tmp_path: Path, seed: int) -> None:
    store, log = Store.open(tmp_path), random_log(random.Random(seed))
    parts = [stored(store, number, part(rows, whole=whole), kind="embed" if whole else "attr") for number, (whole, rows) in enumerate(log)]
    schema = table_schema(SCHEMA, dims=DIMS, vector="float32")
    tables = list(replay(store, parts, schema))
    state = naive(log)
    found = pa.concat_tables([schema.empty_table(), *tables]).sort_by(ID)
    assert found.schema == schema
    assert found.column(ID).to_pylist() == sorted(state)
    assert found.column("price").to_pylist() == [state[name][1] for name in sorted(state)]
    assert found.column(TEXT_HASH).to_pylist() == text_hashes(pa.array([state[name][0] for name in sorted(state)], pa.string())).to_pylist()
    assert found.column(VID).to_pylist() == vids(id_hashes(pa.array(sorted(state), pa.string()))).tolist()
    if state:
        np.testing.assert_array_equal(matrix(found), word_vectors([state[name][0] for name in sorted(state)]))


def test_replay_refuses_a_log_with_a_gap(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    first = stored(store, 0, part(ROWS[:5]))
    change = stored(store, 1, part([("p1", ATTR, "text 1", 9.0)], whole=False), kind="attr")
    other = stored(store, 2, part([("p1", ATTR, "another text", 9.0)], whole=False), kind="attr")
    schema = table_schema(SCHEMA, dims=DIMS, vector="float32")
    assert sum(table.num_rows for table in replay(store, [first, change], schema)) == 5
    with pytest.raises(ManifestError, match="1 products that have no vector"):
        list(replay(store, [change], schema))
    with pytest.raises(ManifestError, match="another text than the vector's"):
        list(replay(store, [first, other], schema))
    assert list(replay(store, [], schema)) == []


@pytest.mark.parametrize("vector", ["float32", "float16"])
def test_replay_keeps_the_vector_type_of_the_table(tmp_path: Path, vector: str) -> None:
    store = Store.open(tmp_path)
    parts = [
        stored(store, 0, part(ROWS[:9], vector=vector)),
        stored(store, 1, part([("p1", ATTR, "text 1", 9.0)], vector=vector, whole=False), kind="attr"),
    ]
    schema = table_schema(SCHEMA, dims=DIMS, vector=vector)
    tables = list(replay(store, parts, schema))
    assert [table.schema for table in tables] == [schema]
    assert tables[0].sort_by(ID).column("price").to_pylist()[:3] == [0.0, 9.0, 2.0]


def test_export_is_a_clean_copy_and_lists_what_it_wrote(tmp_path: Path) -> None:
    store, target = Store.open(tmp_path / "store"), Store.open(tmp_path / "copy")
    parts = [stored(store, number, part(ROWS[start : start + 100])) for number, start in enumerate(range(0, 500, 100))]
    schema = table_schema(SCHEMA, dims=DIMS, vector="float32")
    files = export(replay(store, parts, schema), target, file_rows=180)
    assert [(item.key, item.rows) for item in files] == [
        ("part-00000.parquet", 180),
        ("part-00001.parquet", 180),
        ("part-00002.parquet", 140),
    ]
    listed = json.loads(target.get("manifest.json"))
    assert [item["name"] for item in listed["columns"]] == [ID, TEXT_HASH, ATTR_HASH, "locale", "brand", "price", VECTOR]
    assert listed["rows"] == 500
    for item in listed["files"]:
        data = (tmp_path / "copy" / item["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (item["size"], item["sha256"])
    copied = pa.concat_tables([read_part(target, item) for item in files]).sort_by(ID)
    np.testing.assert_array_equal(matrix(copied), word_vectors([f"text {name[1:]}" for name in copied.column(ID).to_pylist()]))
    with pytest.raises(InputError, match="is not empty"):
        export([], target)
    export(iter([]), Store.open(tmp_path / "empty"))
    assert json.loads((tmp_path / "empty" / "manifest.json").read_text())["files"] == []


def test_an_export_that_is_cut_off_has_no_manifest(tmp_path: Path) -> None:
    target = Store.open(tmp_path)

    def failing() -> Any:
        yield part(ROWS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(failing(), target, file_rows=100)
    assert target.head("manifest.json") is None


def test_what_dead_runs_paid_for_is_found_by_its_text(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    listed = stored(store, 0, part(ROWS[:5]), run="published")
    dead = stored(store, 0, part(ROWS[5:12]), run="dead")
    stored(store, 1, part([("p5", ATTR, "text 5", 1.0)], whole=False), kind="attr", run="dead")
    stored(store, 2, part(ROWS[20:25]), run="dead", **{FINGERPRINT: "another tower"})
    stored(store, 0, part(ROWS[30:35]), run="own")
    store.put("vectors/dead/quarantine.parquet", write_part(part(ROWS[40:45]), metadata={}))
    store.put("vectors/dead/part-00009.parquet", b"PAR1 torn PAR1")
    keys, texts = paid_texts(store, fingerprint="f", vector="float32", skip={listed.key}, own="vectors/own/")
    assert keys == [dead.key]
    assert set(texts.column("part").to_pylist()) == {0}
    assert set(texts.column(TEXT_HASH).to_pylist()) == set(part(ROWS[5:12]).column(TEXT_HASH).to_pylist())
    wanted = part(ROWS[10:14]).column(TEXT_HASH)
    found = vectors_in(store, dead.key, text_hashes=pc.unique(wanted))
    by_hash = dict(zip(found.column(TEXT_HASH).to_pylist(), matrix(found), strict=True))
    assert by_hash.keys() == set(wanted.slice(0, 2).to_pylist())
    np.testing.assert_array_equal(by_hash[wanted[0].as_py()], word_vectors(["text 10"])[0])
