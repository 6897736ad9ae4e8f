"""Segments: equal rows give equal bytes, nothing stored is rewritten, and what is loaded is exactly what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest

from pipelines.errors import CorruptObject, InputError, ManifestError, PlanError
from pipelines.index.build import build_segment
from pipelines.index.loading import load_segment, load_template, trained_sha256
from pipelines.index.search import SegmentSearcher
from pipelines.index.segments import read_roster, segments_of
from pipelines.index.spec import IndexSpec, Segment
from pipelines.manifest import Manifest, ManifestObject
from pipelines.schema import ID, VECTOR, VID
from pipelines.storage import Store
from tests.conftest import S3Server
from tests.generations import sample_manifest
from tests.pipelines.index_nights import DIMS, Floats, named, rows, unit

FLAT = IndexSpec(factory="Flat", nprobe=None, dims=DIMS)
IVF = IndexSpec(factory="IVF4,SQ8", nprobe=2, dims=DIMS)
KINDS = pytest.mark.parametrize(
    "spec", [FLAT, IVF, replace(IVF, factory="IVF4,Flat"), replace(IVF, factory="IVF4,SQfp16")], ids=lambda s: s.factory
)


def products(count: int = 300, seed: int = 0, prefix: str = "p") -> dict[str, Floats]:
    return named(prefix, unit(np.random.default_rng(seed), count))


def base(store: Store, work: Path, spec: IndexSpec = IVF, name: str = "run-base", *, seed: int = 0) -> Segment:
    return build_segment(store, name, rows(products(seed=seed)), spec, kind="base", template=None, work=work)


def manifest(*segments: Segment, **changes: Any) -> Manifest:
    return sample_manifest(segments=tuple(item for segment in segments for item in segment.objects), **changes)


def digests(segment: Segment) -> list[tuple[str, str]]:
    return [(item.role, item.sha256) for item in segment.objects]


@KINDS
def test_bytes_depend_on_neither_order_nor_batches_nor_threads(tmp_path: Path, spec: IndexSpec) -> None:
    catalog, found = products(2000), []
    for number, (batch, threads) in enumerate([(2000, 1), (7, 2), (333, 3)]):
        order = np.random.default_rng(number).permutation(2000).tolist()
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        try:
            source = rows(catalog, batch=batch, order=order)
            store = Store.open(tmp_path / str(number))
            found.append(digests(build_segment(store, "s", source, spec, kind="base", template=None, work=tmp_path / "work")))
            assert faiss.omp_get_max_threads() == threads
        finally:
            faiss.omp_set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert not [*(tmp_path / "work").iterdir()]


def test_training_sample_is_the_same_for_every_order(tmp_path: Path) -> None:
    """More rows than k-means reads: which ones it reads must follow from the set alone."""
    catalog, found = products(700), []
    spec = replace(IVF, factory="IVF2,Flat")
    for number in range(2):
        order = np.random.default_rng(number).permutation(700).tolist()
        store = Store.open(tmp_path / str(number))
        found.append(build_segment(store, "s", rows(catalog, order=order), spec, kind="base", template=None, work=tmp_path).trained_sha256)
    assert found[0] == found[1] is not None


@KINDS
def test_card_brings_back_what_was_built(tmp_path: Path, spec: IndexSpec) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path / "work", spec)
    assert segments_of(store, manifest(built)) == [built]
    roster = read_roster(store, built)
    assert dict(zip(roster.ids.to_pylist(), roster.vids.tolist(), strict=True)).keys() == products().keys()
    index = load_segment(store, built, cache=None)
    stored = index.id_map if spec.nlist is None else None
    if stored is not None:
        assert faiss.vector_to_array(stored).tolist() == roster.vids.tolist()


def test_delta_uses_the_template_of_its_base(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    first = base(store, tmp_path)
    delta = build_segment(store, "run-delta", rows(products(3, seed=9, prefix="d")), IVF, kind="delta", template=first, work=tmp_path)
    assert (delta.template, delta.trained_sha256) == ("run-base", first.trained_sha256)
    assert trained_sha256(load_segment(store, delta, cache=None)) == trained_sha256(load_template(store, first)) == first.trained_sha256
    assert segments_of(store, manifest(delta, first)) == [first, delta]


def test_foreign_template_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    first, other = base(store, tmp_path), base(store, tmp_path, name="other-base", seed=5)
    assert first.trained_sha256 != other.trained_sha256
    delta = build_segment(store, "run-delta", rows(products(3, seed=9, prefix="d")), IVF, kind="delta", template=other, work=tmp_path)
    with pytest.raises(ManifestError, match="another template"):
        SegmentSearcher.open(store, manifest(first, delta))
    renamed = build_segment(
        store,
        "lie-delta",
        rows(products(3, seed=9, prefix="d")),
        IVF,
        kind="delta",
        template=replace(other, name="run-base"),
        work=tmp_path,
    )
    with pytest.raises(ManifestError, match="another template"):
        SegmentSearcher.open(store, manifest(first, renamed))
    # The same lie on the card too: the centroids in the file tell.
    with pytest.raises(CorruptObject, match="centroids"):
        load_segment(store, replace(delta, trained_sha256=first.trained_sha256), cache=None)


def test_spec_of_a_delta_is_that_of_its_base(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    with pytest.raises(InputError, match="spec of the base"):
        build_segment(store, "d", rows(products(3)), FLAT, kind="delta", template=base(store, tmp_path), work=tmp_path)
    with pytest.raises(InputError, match="template"):
        build_segment(store, "d", rows(products(3)), FLAT, kind="delta", template=None, work=tmp_path)


@pytest.mark.parametrize("role", ["faiss", "ids", "segment"])
def test_one_flipped_bit_is_refused_before_anything_is_parsed(tmp_path: Path, role: str) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path)
    path = tmp_path / "store" / built.object(role).key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptObject, match="expected sha256"):
        SegmentSearcher.open(store, manifest(built))


def test_flipped_bit_of_a_template_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path)
    path = tmp_path / "store" / built.object("trained").key
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptObject, match="expected sha256"):
        build_segment(store, "run-delta", rows(products(3)), IVF, kind="delta", template=built, work=tmp_path)


def test_oversized_index_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path)
    size = sum(item.size for item in built.objects)
    SegmentSearcher.open(store, manifest(built), size_limit=size)
    with pytest.raises(InputError, match="more than the limit"):
        SegmentSearcher.open(store, manifest(built), size_limit=size - 1)


@pytest.mark.parametrize("content", [b"", b"not an index", b"IxM2" + b"\xff" * 64])
def test_bytes_that_are_no_index_are_refused(tmp_path: Path, content: bytes) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path, FLAT)
    lie = ManifestObject.of(store.put("segments/run-base/index.faiss", content), role="faiss", rows=built.rows)
    limits = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    with pytest.raises(CorruptObject, match="not readable as a FAISS index"):
        load_segment(store, replace(built, objects=(lie, *(o for o in built.objects if o.role != "faiss"))), cache=None)
    assert limits == (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit())


@pytest.mark.parametrize(
    ("factory", "metric", "dims", "count"),
    [
        ("IDMap2,Flat", faiss.METRIC_L2, DIMS, 300),
        ("IDMap2,Flat", faiss.METRIC_INNER_PRODUCT, DIMS, 299),
        ("IDMap2,Flat", faiss.METRIC_INNER_PRODUCT, DIMS * 2, 300),
        ("IDMap,Flat", faiss.METRIC_INNER_PRODUCT, DIMS, 300),
        ("IDMap2,HNSW8", faiss.METRIC_INNER_PRODUCT, DIMS, 300),
        ("IDMap2,SQ8", faiss.METRIC_INNER_PRODUCT, DIMS, 300),
    ],
)
def test_index_that_differs_from_its_card_is_refused(tmp_path: Path, factory: str, metric: int, dims: int, count: int) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path, FLAT)
    index: Any = faiss.index_factory(dims, factory, metric)
    vectors = unit(np.random.default_rng(0), count, dims)
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(count))
    lie = ManifestObject.of(store.put("segments/run-base/index.faiss", faiss.serialize_index(index).tobytes()), role="faiss", rows=300)
    with pytest.raises(CorruptObject, match="expected"):
        load_segment(store, replace(built, objects=(lie,)), cache=None)


def test_two_ids_with_one_number_are_refused_by_name(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")

    def colliding() -> Iterator[pa.Table]:
        for table in rows(products(10))():
            yield table.set_column(table.schema.get_field_index(VID), VID, pa.array([77] * len(table), pa.int64()))

    with pytest.raises(PlanError, match=r"'p0000[01]' and 'p0000[12]' share the number 77"):
        build_segment(store, "s", colliding, FLAT, kind="base", template=None, work=tmp_path)
    assert not [*store.list()]


@pytest.mark.parametrize("damage", ["null", "nan", "dims", "type", "gone", "twice"])
def test_rows_that_cannot_be_indexed_are_refused(tmp_path: Path, damage: str) -> None:
    store, calls = Store.open(tmp_path / "store"), 0

    def damaged() -> Iterator[pa.Table]:
        nonlocal calls
        calls += 1
        for table in rows(products(20), batch=10)():
            vectors = np.stack(table[VECTOR].to_numpy(zero_copy_only=False)).tolist()
            size, number = DIMS, pa.float32()
            if damage == "null":
                vectors[3] = None
            if damage == "nan":
                vectors[3][2] = float("nan")
            if damage == "dims":
                vectors, size = [vector[:-1] for vector in vectors], DIMS - 1
            if damage == "type":
                number = pa.float64()
            bad = pa.array(vectors, pa.list_(number, size))
            for _ in range(2 if damage == "twice" and calls > 1 else 1):
                yield table.set_column(table.schema.get_field_index(VECTOR), VECTOR, bad)
            if damage == "gone" and calls > 1:
                return

    with pytest.raises(PlanError):
        build_segment(store, "s", damaged, FLAT, kind="base", template=None, work=tmp_path)
    assert not [*store.list()]


def test_segment_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows"):
        build_segment(Store.open(tmp_path), "s", rows({}), FLAT, kind="base", template=None, work=tmp_path / "work")


def test_repeated_run_finds_its_own_bytes_and_refuses_others(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    first = base(store, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.*")}
    assert base(store, tmp_path) == first
    store.delete(first.object("segment").key)
    assert base(store, tmp_path) == first
    kept = {path: path.stat().st_mtime_ns for path in stamps if path.name != "segment.json"}
    assert kept == {path: stamp for path, stamp in stamps.items() if path.name != "segment.json"}
    with pytest.raises(PlanError, match="other content"):
        base(store, tmp_path, seed=1)


def test_segment_in_a_bucket_is_downloaded_once_and_verified(tmp_path: Path, s3: S3Server) -> None:
    bucket = s3.bucket()
    store = Store.open(f"s3://{bucket}/shop", options=s3.options)
    built = base(store, tmp_path / "work")
    queries, cache = unit(np.random.default_rng(2), 3), tmp_path / "cache"
    plain = SegmentSearcher.open(store, manifest(built)).search(queries, 5)
    assert SegmentSearcher.open(store, manifest(built), cache=cache).search(queries, 5).ids == plain.ids
    kept = cache / built.object("faiss").sha256
    kept.write_bytes(b"damaged")
    assert SegmentSearcher.open(store, manifest(built), cache=cache).search(queries, 5).ids == plain.ids
    stamp = kept.stat().st_mtime_ns
    SegmentSearcher.open(store, manifest(built), cache=cache)
    assert kept.stat().st_mtime_ns == stamp
    data = bytearray(store.get(built.object("faiss").key))
    data[100] ^= 1
    s3.client().put_object(Bucket=bucket, Key=f"shop/{built.object('faiss').key}", Body=bytes(data))
    with pytest.raises(CorruptObject, match="expected sha256"):
        SegmentSearcher.open(store, manifest(built), cache=tmp_path / "other")
    assert not [*(tmp_path / "other").iterdir()]


def test_bucket_takes_a_segment_too_large_for_one_request(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(f"s3://{s3.bucket()}", options=s3.options)
    monkeypatch.setattr("pipelines.index.segments.MAX_CONDITIONAL_BYTES", 10)
    monkeypatch.setattr("pipelines.storage.MAX_CONDITIONAL_BYTES", 10)
    first = base(store, tmp_path)
    assert base(store, tmp_path) == first
    for item in first.objects:
        store.verify(item)
    with pytest.raises(PlanError, match="other content"):
        base(store, tmp_path, seed=1)


def test_writer_who_was_first_is_not_overwritten(tmp_path: Path) -> None:
    theirs = tmp_path / "store" / "segments" / "run-base" / "index.faiss"

    class Race:
        """Somebody else finishes the same file while we write ours."""

        def reach(self, point: str) -> None:
            if point == "fsync:segments:before" and not theirs.exists():
                theirs.write_bytes(b"theirs")

    with pytest.raises(PlanError, match="other content"):
        base(Store.open(tmp_path / "store", faults=Race()), tmp_path, FLAT)
    assert theirs.read_bytes() == b"theirs"


def test_index_with_numbers_that_its_map_does_not_have_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path, FLAT)
    other = build_segment(store, "other", rows(products(prefix="q")), FLAT, kind="base", template=None, work=tmp_path)
    lie = ManifestObject.of(store.put(built.object("ids").key, store.get(other.object("ids").key)), role="ids", rows=300)
    swapped = replace(built, objects=tuple(lie if item.role == "ids" else item for item in built.objects))
    with pytest.raises(CorruptObject, match="its id map does not"):
        SegmentSearcher.open(store, manifest(swapped)).search(unit(np.random.default_rng(0), 1), 3)


def test_column_names_are_those_of_the_schema(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path)
    import pyarrow.parquet as pq

    assert pq.read_schema(tmp_path / "store" / built.object("ids").key).names == [VID, ID]
