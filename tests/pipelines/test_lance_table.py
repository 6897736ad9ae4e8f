"""The Lance table holds exactly what its generations say, whatever died in between, on disk and on S3."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import CorruptObject, InputError, NotFound, StoreError
from pipelines.hashes import id_hashes
from pipelines.schema import ID, ID_HASH, TEXT_HASH, VECTOR, VID
from pipelines.storage import Store
from pipelines.stores.lance import (
    TableSpec,
    apply,
    build,
    commit_build,
    counts,
    index_state,
    indexes,
    opening,
    pin,
    read_published,
    read_rows,
    refresh_indexes,
    restore,
    rows_digest,
    sizes,
    sweep,
    take,
    untag,
    vectors_of,
    write_fragments,
)
from tests.pipelines.lance_rows import Place, bulk, local, many, product, remote, rows, spec_of

SPEC = spec_of()
NOW = timedelta(0)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return local(tmp_path) if request.param == "local" else remote(request.getfixturevalue("s3"))


@pytest.fixture
def disk(tmp_path: Path) -> Place:
    return local(tmp_path)


def content(place: Place, version: int, spec: TableSpec = SPEC) -> list[dict[str, Any]]:
    names = spec.schema.names
    found = pa.concat_tables(read_rows(place.uri, version=version, columns=names, options=place.options, batch_rows=100))
    listed: list[dict[str, Any]] = found.sort_by(ID).to_pylist()
    return listed


def changed(place: Place, spec: TableSpec = SPEC, *, live: int, **changes: pa.Table) -> int:
    upserts, attrs, deletes = ([changes[name]] if name in changes else [] for name in ("upserts", "attrs", "deletes"))
    return apply(place.uri, upserts=upserts, attrs=attrs, deletes=deletes, spec=spec, options=place.options, expect_live=live)


def pinned(place: Place, version: int, tag: str = "g000001", previous: Any = None) -> Any:
    return pin(place.uri, version=version, tag=tag, previous=previous, store=place.store, key=place.key, options=place.options)


def keys(*names: str) -> pa.Table:
    return pa.table({ID_HASH: id_hashes(pa.array(names, pa.string()))})


def vector_files(place: Place) -> set[str]:
    dataset = lance.dataset(place.uri)
    number = {field.name(): field.id() for field in dataset.lance_schema.fields()}[VECTOR]
    return {file.path for item in dataset.get_fragments() for file in item.metadata.files if number in file.fields}


def folder_bytes(place: Place) -> int:
    return sum(item.size for item in place.store.list(place.key))


def test_nights_of_changes_equal_a_plain_dictionary(place: Place) -> None:
    draw = np.random.default_rng(5)
    spec = spec_of(fold_after=2)
    shop = {f"p{number}": product(f"p{number}") for number in range(600)}
    build(place.uri, [rows([*shop.values()][:250], spec), rows([*shop.values()][250:], spec)], spec, place.options)
    refresh_indexes(place.uri, spec, place.options)
    folded: set[str] = set()
    previous = None
    for night in range(1, 4):
        names = [str(name) for name in draw.permutation(sorted(shop))[:40]]
        new = {f"n{night}-{number}": product(f"n{night}-{number}") for number in range(15)}
        texts = {name: product(name, text=night, attr=night) for name in names[:10]}
        attrs = {
            name: shop[name] | {k: v for k, v in product(name, attr=night).items() if k not in (VECTOR, TEXT_HASH)} for name in names[10:30]
        }
        for name in names[30:]:
            del shop[name]
        shop |= new | texts | attrs
        update = rows([*attrs.values()], spec).drop_columns([VECTOR])
        version = changed(
            place, spec, live=len(shop), upserts=rows([*new.values(), *texts.values()], spec), attrs=update, deletes=keys(*names[30:])
        )
        state = refresh_indexes(place.uri, spec, place.options)
        folded |= {*state.folded}
        assert state.version > version
        assert set(state.unindexed.values()) == {0}
        assert max(state.deltas.values()) <= spec.fold_after
        expected = rows([*shop.values()], spec)
        assert content(place, state.version, spec) == expected.sort_by(ID).to_pylist()
        previous = pinned(place, state.version, tag=f"g{night:06d}", previous=previous)
        assert previous.rows_digest == rows_digest([expected])
    assert {"id_hash_idx", "vector_idx", "brand_fts", "brand_idx"} <= folded


def test_published_rows_are_read_as_before(place: Place) -> None:
    version = build(place.uri, [many(["a", "b"], SPEC)], SPEC, place.options)
    found = pa.concat_tables(read_published(place.uri, version=version, options=place.options))
    assert sorted(found.column(ID).to_pylist()) == ["a", "b"]
    assert counts(place.uri, version=version, options=place.options) == 2


def test_restore_takes_back_what_a_dead_run_committed(place: Place) -> None:
    build(place.uri, [many(["a", "b", "c"], SPEC)], SPEC, place.options)
    good = refresh_indexes(place.uri, SPEC, place.options).version
    before = content(place, good)
    changed(place, live=2, deletes=keys("a"))
    changed(place, live=3, upserts=rows([product("b", text=1), product("d")], SPEC))
    restore(place.uri, version=good, options=place.options)
    latest = lance.dataset(place.uri, storage_options=dict(place.options) or None).version
    assert content(place, latest) == before
    assert set(index_state(place.uri, options=place.options).unindexed.values()) == {0}
    restore(place.uri, version=latest, options=place.options)
    assert lance.dataset(place.uri, storage_options=dict(place.options) or None).version == latest


def test_restore_of_a_swept_version_is_refused(disk: Place) -> None:
    first = build(disk.uri, [many(["a"], SPEC)], SPEC, {})
    changed(disk, live=2, upserts=many(["b"], SPEC))
    sweep(disk.uri, keep_versions=set(), older_than=NOW, options={}, dry_run=False)
    with pytest.raises(NotFound, match=r"no table .* at version 1"):
        restore(disk.uri, version=first, options={})


def test_a_first_run_that_died_leaves_nothing_to_the_next(place: Place) -> None:
    restore(place.uri, version=None, options=place.options)
    write_fragments(place.uri, many(["orphan"], SPEC), SPEC, place.options)
    restore(place.uri, version=None, options=place.options)
    build(place.uri, [many(["a"], SPEC)], SPEC, place.options)
    restore(place.uri, version=None, options=place.options)
    assert not [*place.store.list(place.key)]
    version = build(place.uri, [many(["b"], SPEC)], SPEC, place.options)
    assert [row[ID] for row in content(place, version)] == ["b"]


def test_a_tagged_table_outlives_a_build_from_nothing(place: Place) -> None:
    first = build(place.uri, [many(["a"], SPEC)], SPEC, place.options)
    pinned(place, first)
    restore(place.uri, version=None, options=place.options)
    second = build(place.uri, [many(["b", "c"], SPEC)], SPEC, place.options)
    assert [row[ID] for row in content(place, first)] == ["a"]
    assert [row[ID] for row in content(place, second)] == ["b", "c"]


def test_fragments_of_many_workers_become_one_table(place: Place) -> None:
    parts: list[list[str]] = [[], [], []]

    def work(number: int) -> None:
        names = [f"{number}-{index}" for index in range(50)]
        parts[number] = write_fragments(place.uri, many(names, SPEC), SPEC, place.options)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    version = commit_build(place.uri, [item for part in parts for item in part], SPEC, place.options)
    assert counts(place.uri, version=version, options=place.options) == 150
    dataset = lance.dataset(place.uri, storage_options=dict(place.options) or None)
    assert dataset.data_storage_version == "2.2"
    assert [field.name() for field in dataset.lance_schema.unenforced_primary_key()] == [ID_HASH]
    assert write_fragments(place.uri, SPEC.schema.empty_table(), SPEC, place.options) == []


def test_an_attribute_update_rewrites_no_vector(disk: Place) -> None:
    spec = spec_of(flat_below=500)
    table = bulk(20_000, spec)
    build(disk.uri, [table], spec, {})
    refresh_indexes(disk.uri, spec, {})
    vectors, size = vector_files(disk), folder_bytes(disk)
    cheaper = table.slice(100, 300).drop_columns([ID, VID, TEXT_HASH, VECTOR])
    cheaper = cheaper.set_column(cheaper.schema.get_field_index("price"), spec.schema.field("price"), pa.array([1.25] * 300))
    version = changed(disk, spec, live=20_000, attrs=cheaper)
    assert vector_files(disk) == vectors
    assert folder_bytes(disk) - size < table.column(VECTOR).nbytes / 2
    state = index_state(disk.uri, options={})
    assert state.unindexed[f"{VECTOR}_idx"] == state.unindexed["id_idx"] == 0
    assert state.unindexed["price_idx"] > 0
    found = take(disk.uri, version=version, by=ID, values=pa.array(["bulk-100", "bulk-99"]), columns=[ID, "price", VECTOR], options={})
    by_id = {row[ID]: row for row in found.to_pylist()}
    assert by_id["bulk-100"]["price"] == 1.25
    assert by_id["bulk-99"]["price"] != 1.25
    assert by_id["bulk-100"][VECTOR] == table.column(VECTOR)[100].as_py()
    assert refresh_indexes(disk.uri, spec, {}).unindexed["price_idx"] == 0


def test_an_attribute_update_rewrites_no_vector_without_indexes_either(disk: Place) -> None:
    build(disk.uri, [many(["a", "b", "c"], SPEC)], SPEC, {})
    vectors = vector_files(disk)
    changed(disk, live=3, attrs=rows([product("b", attr=1)], SPEC).drop_columns([VECTOR]))
    assert vector_files(disk) == vectors


def test_nothing_to_apply_commits_nothing(place: Place) -> None:
    version = build(place.uri, [many(["a"], SPEC)], SPEC, place.options)
    empty = SPEC.schema.empty_table()
    assert changed(place, live=1) == version
    assert changed(place, live=1, upserts=empty, attrs=empty.drop_columns([VECTOR]), deletes=empty.select([ID_HASH])) == version


def test_a_build_of_nothing_is_refused_and_keeps_the_table(disk: Place) -> None:
    version = build(disk.uri, [many(["a"], SPEC)], SPEC, {})
    with pytest.raises(StoreError, match="has no rows"):
        build(disk.uri, [SPEC.schema.empty_table()], SPEC, {})
    assert lance.dataset(disk.uri).version == version


@pytest.mark.parametrize("first", ["known", "new"])
def test_a_product_named_twice_is_refused(disk: Place, first: str) -> None:
    build(disk.uri, [many(["known", "other"], SPEC)], SPEC, {})
    twice = rows([product(first), product("x"), product(first, text=2)], SPEC)
    with pytest.raises(StoreError, match="1 products are named twice"):
        changed(disk, live=3, upserts=twice)
    with pytest.raises(StoreError, match="named twice"):
        apply(disk.uri, upserts=[many([first], SPEC)], attrs=[], deletes=[keys(first)], spec=SPEC, options={}, expect_live=2)
    with pytest.raises(StoreError, match="named twice"):
        build(f"{disk.uri}2", [many([first], SPEC), many(["y", first], SPEC)], SPEC, {})
    assert lance.dataset(disk.uri).count_rows() in (1, 2)


def test_keys_are_compared_over_many_chunks(disk: Place) -> None:
    build(disk.uri, [many(["a"], SPEC)], SPEC, {})
    apply(
        disk.uri,
        upserts=[],
        attrs=[],
        deletes=(keys(*(f"{a}-{b}" for b in range(9))) for a in range(30)),
        spec=SPEC,
        options={},
        expect_live=1,
    )
    from pipelines.stores.lance.table import _Keys

    seen = _Keys("somewhere")
    for number in range(40):
        seen.admit(id_hashes(pa.array([f"{number}-{index}" for index in range(number % 7)], pa.string())))
    with pytest.raises(StoreError, match="named twice"):
        seen.admit(id_hashes(pa.array(["fresh", "16-1"])))


def test_changes_that_do_not_fit_the_table_are_refused(disk: Place) -> None:
    build(disk.uri, [many(["a", "b"], SPEC)], SPEC, {})
    with pytest.raises(StoreError, match="1 of 2 attribute updates found no row"):
        changed(disk, live=2, attrs=many(["a", "gone"], SPEC).drop_columns([VECTOR]))
    with pytest.raises(StoreError, match="has 2 rows after the changes, expected 3"):
        changed(disk, live=3, deletes=keys("never there"))


def test_rows_that_lance_would_never_read_again_are_refused(disk: Place) -> None:
    build(disk.uri, [many(["a"], SPEC)], SPEC, {})
    good = many(["b"], SPEC)
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    place = good.schema.get_field_index("brand")
    nothing = pa.nulls(1, SPEC.schema.field(VECTOR).type)
    for bad in (
        good.set_column(place, "brand", broken),
        good.set_column(good.schema.get_field_index(VECTOR), VECTOR, nothing),
        good.drop_columns([VID]),
    ):
        with pytest.raises(StoreError, match="do not fit its columns"):
            changed(disk, live=2, upserts=bad)
    assert lance.dataset(disk.uri).count_rows() == 1


def test_a_hundred_thousand_deletes_take_seconds(disk: Place) -> None:
    table = bulk(120_000, SPEC)
    build(disk.uri, [table], SPEC, {})
    begin = time.perf_counter()
    version = changed(disk, live=20_000, deletes=table.slice(0, 100_000).select([ID_HASH]))
    assert time.perf_counter() - begin < 5
    assert counts(disk.uri, version=version, options={}) == 20_000
    assert sizes(disk.uri, version=version, options={})["deleted_rows"] == 100_000


def test_half_precision_is_kept_and_indexed(disk: Place) -> None:
    spec = spec_of(vector="float16", flat_below=100)
    version = build(disk.uri, [many([f"p{number}" for number in range(300)], spec)], spec, {})
    assert f"{VECTOR}_idx" in refresh_indexes(disk.uri, spec, {}).built
    changed(disk, spec, live=301, upserts=many(["q"], spec))
    state = refresh_indexes(disk.uri, spec, {})
    assert state.unindexed[f"{VECTOR}_idx"] == 0
    assert content(disk, version, spec)[0][VECTOR] == pytest.approx(product("p0")[VECTOR], abs=1e-3)
    assert lance.dataset(disk.uri).schema.field(VECTOR).type.value_type == pa.float16()


def test_indexes_are_created_once_and_extended(disk: Place) -> None:
    spec = spec_of(flat_below=400)
    build(disk.uri, [many([f"p{number}" for number in range(300)], spec)], spec, {})
    first = refresh_indexes(disk.uri, spec, {})
    assert f"{VECTOR}_idx" not in first.deltas
    kinds = {index.name: index.index_type for index in lance.dataset(disk.uri).describe_indices()}
    assert (kinds["stock_idx"], kinds["brand_idx"], kinds["price_idx"], kinds["id_idx"]) == ("Bitmap", "Bitmap", "BTree", "BTree")
    assert refresh_indexes(disk.uri, spec, {}) == replace(first, built=())
    changed(disk, spec, live=450, upserts=many([f"q{number}" for number in range(150)], spec))
    second = refresh_indexes(disk.uri, spec, {})
    assert second.built == (f"{VECTOR}_idx",)
    assert second.deltas["id_idx"] == 2
    changed(disk, spec, live=451, upserts=many(["r"], spec))
    assert refresh_indexes(disk.uri, spec, {}).built == ()


@pytest.mark.parametrize("kind", ["IVF_FLAT", "IVF_SQ", "IVF_RQ", "IVF_PQ", "IVF_HNSW_SQ"])
def test_every_kind_of_vector_index_is_extended_and_folded(disk: Place, kind: str) -> None:
    spec = spec_of(vector_index=kind, fold_after=2, scalar=(), text=())
    build(disk.uri, [many([f"p{number}" for number in range(300)], spec)], spec, {})
    refresh_indexes(disk.uri, spec, {})
    pieces = []
    for number in range(3):
        changed(disk, spec, live=301 + number, upserts=many([f"q{number}"], spec))
        state = refresh_indexes(disk.uri, spec, {})
        pieces.append(state.deltas[f"{VECTOR}_idx"])
        assert state.unindexed[f"{VECTOR}_idx"] == 0
    assert pieces == [2, 1, 2]


def test_a_vector_index_that_the_table_has_outgrown_is_built_anew(disk: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    build(disk.uri, [many([f"p{number}" for number in range(600)], SPEC)], SPEC, {})
    refresh_indexes(disk.uri, SPEC, {})
    changed(disk, live=601, upserts=many(["q"], SPEC))
    assert refresh_indexes(disk.uri, SPEC, {}).deltas[f"{VECTOR}_idx"] == 2
    monkeypatch.setattr(indexes, "_PARTITION_ROWS", 100)
    state = refresh_indexes(disk.uri, SPEC, {})
    assert (state.built, state.deltas[f"{VECTOR}_idx"]) == ((f"{VECTOR}_idx",), 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"vector_index": "IVF_SG"}, "unknown vector index `IVF_SG`"),
        ({"scalar": ("colour",)}, "`colour` cannot be indexed"),
        ({"text": ("price",)}, "`price` cannot have a full-text index"),
        ({"fold_after": 0}, "fold_after must be 1 or more"),
    ],
)
def test_a_spec_that_no_table_can_have_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec_of(**how)


def test_an_emptied_table_can_be_filled_again(disk: Place) -> None:
    build(disk.uri, [many(["a", "b"], SPEC)], SPEC, {})
    refresh_indexes(disk.uri, SPEC, {})
    changed(disk, live=0, deletes=keys("a", "b"))
    empty = refresh_indexes(disk.uri, SPEC, {}).version
    assert pinned(disk, empty).rows_digest == "0" * 32
    changed(disk, live=1, upserts=many(["a"], SPEC))
    assert set(refresh_indexes(disk.uri, SPEC, {}).unindexed.values()) == {0}


def test_a_refresh_beside_commits_loses_neither(disk: Place) -> None:
    build(disk.uri, [many([f"p{number}" for number in range(200)], SPEC)], SPEC, {})
    refresh_indexes(disk.uri, SPEC, {})
    failures: list[BaseException] = []

    def refreshing() -> None:
        try:
            for _ in range(6):
                refresh_indexes(disk.uri, SPEC, {})
        except StoreError as error:
            if "miss rows after a refresh" not in str(error):  # the other thread was faster, which is no lost commit
                failures.append(error)

    other = threading.Thread(target=refreshing)
    other.start()
    for number in range(8):
        changed(disk, live=201 + number, upserts=many([f"q{number}"], SPEC))
    other.join()
    assert failures == []
    assert lance.dataset(disk.uri).count_rows() == 208


@pytest.mark.parametrize("rivals", [2, 99])
def test_a_lost_commit_race_is_run_again_a_bounded_number_of_times(disk: Place, rivals: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build(disk.uri, [many(["a", "b"], SPEC)], SPEC, {})
    monkeypatch.setattr(opening, "_PAUSE_S", 0.0001)
    tries = 0

    def indexed(dataset: Any) -> None:
        dataset.create_scalar_index("price", "BTREE", name="price_idx", replace=True)

    def work(dataset: Any) -> None:
        nonlocal tries
        tries += 1
        if tries <= rivals:
            indexed(lance.dataset(disk.uri))
        indexed(dataset)

    refused = contextlib.nullcontext() if rivals == 2 else pytest.raises(StoreError, match="preempted by concurrent")
    with refused, opening.explained("index", disk.uri):
        opening.committed(disk.uri, options={}, work=work)
    assert tries == (3 if rivals == 2 else 6)


def test_another_kind_of_failure_is_not_run_again(disk: Place) -> None:
    build(disk.uri, [many(["a"], SPEC)], SPEC, {})
    tries: list[int] = []

    def work(dataset: Any) -> None:
        tries.append(1)
        dataset.drop_index("colour_idx")

    with pytest.raises(StoreError, match="cannot index table"), opening.explained("index", disk.uri):
        opening.committed(disk.uri, options={}, work=work)
    assert tries == [1]


class Recorded:
    """Remembers the fail points that were passed."""

    def __init__(self) -> None:
        self.points: list[str] = []

    def reach(self, point: str) -> None:
        self.points.append(point)


def test_every_new_file_and_the_tag_survive_a_power_loss(tmp_path: Path) -> None:
    faults = Recorded()
    place = Place(store=Store.open(tmp_path / "store", faults=faults), options={})
    build(place.uri, [many([f"p{number}" for number in range(20)], SPEC)], SPEC, {})
    first = pinned(place, refresh_indexes(place.uri, SPEC, {}).version)
    assert faults.points.count("sync:tables:after") == len(first.objects) + 1
    faults.points.clear()
    second = pinned(place, changed(place, live=19, deletes=keys("p3")), tag="g000002", previous=first)
    assert (
        faults.points.count("sync:tables:after")
        == len({item.key for item in second.objects} - {item.key for item in first.objects}) + 1
        == 3
    )


def test_pin_lists_every_file_by_content(place: Place) -> None:
    build(place.uri, [many([f"p{number}" for number in range(20)], SPEC)], SPEC, place.options)
    changed(place, live=19, deletes=keys("p3"))
    version = refresh_indexes(place.uri, SPEC, place.options).version
    made = pinned(place, version)
    for item in made.objects:
        place.store.verify(item)
    folders = {item.key.removeprefix(f"{place.key}/").split("/")[0] for item in made.objects}
    assert folders == {"data", "_deletions", "_indices", "_versions"}
    assert {item.role for item in made.objects} == {"table"}
    assert sum(item.rows or 0 for item in made.objects) == 20
    dataset = lance.dataset(place.uri, version="g000001", storage_options=dict(place.options) or None)
    assert (dataset.version, made.uri, made.tag) == (version, place.key, "g000001")
    again = changed(place, live=20, upserts=many(["late"], SPEC))
    assert pinned(place, again).version == again == place_tag(place)


def place_tag(place: Place) -> int:
    return int(lance.dataset(place.uri, version="g000001", storage_options=dict(place.options) or None).version)


def test_a_copy_of_the_pinned_objects_is_the_whole_table(disk: Place, tmp_path: Path) -> None:
    build(disk.uri, [many([f"p{number}" for number in range(600)], SPEC)], SPEC, {})
    changed(disk, live=599, deletes=keys("p3"))
    version = refresh_indexes(disk.uri, SPEC, {}).version
    made = pinned(disk, version)
    copy = Place(store=Store.open(tmp_path / "copy"), options={})
    for item in made.objects:
        copy.store.put(item.key, disk.store.read_verified(item))
    assert content(copy, version) == content(disk, version)
    assert index_state(copy.uri, options={}, version=version) == index_state(disk.uri, options={}, version=version)
    lance.dataset(copy.uri).validate()


def test_a_flipped_bit_in_any_pinned_file_is_found(disk: Place) -> None:
    build(disk.uri, [many([f"p{number}" for number in range(600)], SPEC)], SPEC, {})
    changed(disk, live=599, deletes=keys("p3"))
    made = pinned(disk, refresh_indexes(disk.uri, SPEC, {}).version)
    draw = np.random.default_rng(1)
    for item in made.objects:
        path = Path(disk.store.uri(item.key))
        whole = path.read_bytes()
        torn = bytearray(whole)
        torn[int(draw.integers(len(torn)))] ^= 1 << int(draw.integers(8))
        path.write_bytes(torn)
        with pytest.raises(CorruptObject):
            disk.store.verify(item)
        path.write_bytes(whole)


@pytest.mark.parametrize("hurt", ["cut", "cut and padded", "gone"])
def test_a_data_file_that_was_not_written_whole_is_not_pinned(disk: Place, hurt: str) -> None:
    version = build(disk.uri, [many([f"p{number}" for number in range(200)], SPEC)], SPEC, {})
    (path,) = (Path(disk.uri) / "data").iterdir()
    whole = path.read_bytes()
    if hurt == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-300] + (bytes(300) if hurt == "cut and padded" else b""))
    with pytest.raises(StoreError):
        pinned(disk, version)
    assert lance.dataset(disk.uri).tags.list() == {}


def test_a_column_that_cannot_be_read_back_is_not_pinned(disk: Place) -> None:
    marked = rows([product(f"p{number}") | {"brand": f"marker number {number:04d}"} for number in range(300)], SPEC)
    version = build(disk.uri, [marked], SPEC, {})
    (path,) = (Path(disk.uri) / "data").iterdir()
    whole = path.read_bytes()
    assert b"marker" in whole
    path.write_bytes(whole.replace(b"marker", b"\xff\xfe\xff\xfe\xff\xfe"))
    with pytest.raises(StoreError, match="cannot read back"):
        pinned(disk, version)


def test_what_an_earlier_generation_proved_is_not_read_again(disk: Place) -> None:
    build(disk.uri, [many([f"p{number}" for number in range(50)], SPEC)], SPEC, {})
    first = pinned(disk, refresh_indexes(disk.uri, SPEC, {}).version)
    version = changed(disk, live=51, upserts=many(["new"], SPEC))
    proved = next(item for item in first.objects if "/data/" in item.key)
    marked = replace(first, objects=tuple(replace(item, sha256="0" * 64) if item == proved else item for item in first.objects))
    second = pinned(disk, version, tag="g000002", previous=marked)
    assert {item.sha256 for item in second.objects if item.key == proved.key} == {"0" * 64}
    fresh = [item for item in second.objects if item.key not in {old.key for old in first.objects}]
    assert sum(item.rows or 0 for item in fresh) == 1
    Path(disk.store.uri(proved.key)).write_bytes(b"short")
    with pytest.raises(CorruptObject, match="has 5 bytes, expected"):
        pinned(disk, version, tag="g000003", previous=first)


def test_tags_keep_versions_over_a_sweep(place: Place) -> None:
    versions = [build(place.uri, [many(["a"], SPEC)], SPEC, place.options)]
    versions += [changed(place, live=number + 2, upserts=many([f"b{number}"], SPEC)) for number in range(4)]
    pinned(place, versions[0])
    kept: dict[str, Any] = {"keep_versions": {versions[2]}, "older_than": NOW, "options": place.options}
    assert sweep(place.uri, **kept | {"older_than": timedelta(hours=1)}, dry_run=False).versions_removed == ()
    would = sweep(place.uri, **kept, dry_run=True)
    assert would.versions_removed == (versions[1], versions[3])
    assert sweep(place.uri, **kept, dry_run=False) == would
    for version, names in ((versions[0], 1), (versions[2], 3), (versions[4], 5)):
        assert len(content(place, version)) == names
    with pytest.raises(NotFound):
        content(place, versions[1])
    untag(place.uri, "g000001", place.options)
    untag(place.uri, "g000001", place.options)
    assert sweep(place.uri, **kept, dry_run=False).versions_removed == (versions[0],)


def test_sweep_gives_back_the_bytes_that_only_old_versions_named(disk: Place) -> None:
    build(disk.uri, [bulk(5_000, SPEC)], SPEC, {})
    build(disk.uri, [many(["a"], SPEC)], SPEC, {})
    before = folder_bytes(disk)
    result = sweep(disk.uri, keep_versions=set(), older_than=NOW, options={}, dry_run=False)
    assert before - folder_bytes(disk) == result.bytes > 5_000 * 32 * 4


@pytest.mark.parametrize("by", [ID, ID_HASH, VID])
@pytest.mark.parametrize("indexed", [False, True])
def test_rows_are_found_by_any_key(disk: Place, by: str, indexed: bool) -> None:
    names = ["a", "b' OR '1'='1", 'c"; drop', "東", "e\\"]
    table = many(names, SPEC)
    build(disk.uri, [table], SPEC, {})
    version = refresh_indexes(disk.uri, SPEC, {}).version if indexed else 1
    wanted = pa.concat_arrays([table.column(by).slice(1, 3).combine_chunks(), table.column(by).slice(1, 1).combine_chunks()])
    found = take(disk.uri, version=version, by=by, values=wanted, columns=[ID, "price"], options={})
    assert sorted(found.column(ID).to_pylist()) == sorted(names[1:4])
    assert take(disk.uri, version=version, by=by, values=wanted.slice(0, 0), columns=[ID], options={}).num_rows == 0
    with pytest.raises(StoreError, match="lacks the columns colour"):
        take(disk.uri, version=version, by=by, values=wanted, columns=["colour"], options={})


def test_one_vector_comes_back_for_each_text(place: Place) -> None:
    shared = [product(name) for name in ("a", "b", "c")]
    for item in shared:
        item[TEXT_HASH] = shared[0][TEXT_HASH]
    build(place.uri, [rows([*shared, product("d"), product("e")], SPEC)], SPEC, place.options)
    version = refresh_indexes(place.uri, SPEC, place.options).version
    asked = pa.array([shared[0][TEXT_HASH], product("d")[TEXT_HASH], b"0" * 16], pa.binary(16))
    found = vectors_of(place.uri, version=version, text_hashes=asked, options=place.options)
    lowest = min(shared, key=lambda item: id_hashes(pa.array([item[ID]]))[0].as_py())
    expected = {lowest[TEXT_HASH]: lowest[VECTOR].tolist(), product("d")[TEXT_HASH]: product("d")[VECTOR].tolist()}
    assert {row[TEXT_HASH]: row[VECTOR] for row in found.to_pylist()} == expected
    assert found.num_rows == 2
    assert vectors_of(place.uri, version=version, text_hashes=asked.slice(2), options=place.options).num_rows == 0


def pieces(table: pa.Table, size: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, size):
        yield table.slice(start, size)


def test_the_digest_ignores_order_and_notices_every_change() -> None:
    table = many([f"p{number}" for number in range(50)], SPEC)
    digest = rows_digest([table])
    shuffled = table.take(pa.array(np.random.default_rng(2).permutation(50)))
    assert rows_digest(pieces(shuffled, 7)) == digest
    assert rows_digest([table.slice(1)]) != digest
    assert rows_digest([table, table.slice(0, 1)]) != digest
    swapped = table.set_column(3, TEXT_HASH, table.column(TEXT_HASH).take(pa.array([1, 0, *range(2, 50)])))
    assert rows_digest([swapped]) != digest
    crossed = table.rename_columns([{"text_hash": "attr_hash", "attr_hash": "text_hash"}.get(name, name) for name in table.schema.names])
    assert rows_digest([crossed]) != digest


def test_the_digest_of_one_known_row_never_changes() -> None:
    row = pa.table(
        {name: pa.array([bytes(range(start, start + 16))], pa.binary(16)) for start, name in enumerate((ID_HASH, TEXT_HASH, "attr_hash"))}
    )
    assert rows_digest([row]) == "7a7663c45288982722a1072bf7668650"


def test_the_digest_of_many_rows_is_fast() -> None:
    raw = np.random.default_rng(1).bytes(200_000 * 16)
    hashes = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), 200_000, [None, pa.py_buffer(raw)])
    table = pa.table(dict.fromkeys((ID_HASH, TEXT_HASH, "attr_hash"), hashes))
    begin = time.perf_counter()
    rows_digest([table])
    assert time.perf_counter() - begin < 0.3
