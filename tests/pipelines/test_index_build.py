"""Segments: equal rows give equal bytes, nothing stored is rewritten, and what is loaded is exactly what was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.contracts import one_by_one
from pipelines.errors import CorruptObject, InputError, PlanError
from pipelines.index.build import Rows, build_base, build_delta, mixed
from pipelines.index.lists import codes_of, encode, list_of, pieces, trained_sha256
from pipelines.index.loading import load_segment, load_template
from pipelines.index.search import SegmentSearcher
from pipelines.index.segments import CARD, FAISS, IDS, TRAINED, read_roster, segments_of
from pipelines.index.spec import IndexSpec, Segment
from pipelines.manifest import Manifest, ManifestObject
from pipelines.schema import ID, VECTOR, VID
from pipelines.storage import Store
from pipelines.workers import spread
from tests.conftest import S3Server
from tests.generations import sample_manifest
from tests.pipelines.index_nights import DIMS, FACTORIES, Floats, named, of, rows, unit

EVERY = pytest.mark.parametrize("factory", FACTORIES)


def products(count: int = 300, seed: int = 0, prefix: str = "p") -> dict[str, Floats]:
    return named(prefix, unit(np.random.default_rng(seed), count))


def base(store: Store, work: Path, factory: str = "IVF4,SQ8", name: str = "run-base", *, seed: int = 0) -> Segment:
    return build_base(store, name, of(products(seed=seed)), IndexSpec(factory=factory, dims=DIMS), work=work)


def manifest(*segments: Segment, **changes: Any) -> Manifest:
    return sample_manifest(segments=tuple(item for segment in segments for item in segment.objects), **changes)


def digests(segment: Segment) -> list[tuple[str, str]]:
    return [(item.role, item.sha256) for item in segment.objects]


def template_of(store: Store, segment: Segment) -> Any:
    assert segment.trained is not None
    return load_template(store, segment.object(TRAINED), segment.spec, trained=segment.trained.sha256)


@EVERY
def test_bytes_depend_on_neither_order_nor_batches_nor_pieces_nor_threads(tmp_path: Path, factory: str) -> None:
    catalog, found = products(420), []
    extra = products(40, seed=9, prefix="d")
    for number, (batch, cuts, threads) in enumerate([(420, 1, 1), (7, 3, 2), (133, 5, 3)]):
        rng, before = np.random.default_rng(number), faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        try:
            store, work = Store.open(tmp_path / str(number)), tmp_path / "work"
            spec = IndexSpec(factory=factory, dims=DIMS)
            first = build_base(store, "s", of(catalog, cuts=cuts, batch=batch, order=rng.permutation(420)), spec, work=work)
            delta = build_delta(store, "d", of(extra, cuts=cuts, batch=batch, order=rng.permutation(40)), first, work=work)
            found.append((digests(first), digests(delta)))
            assert faiss.omp_get_max_threads() == threads
        finally:
            faiss.omp_set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert not [*(tmp_path / "work").iterdir()]


@pytest.mark.usefixtures("ray_cluster")
def test_workers_of_a_cluster_build_the_same_bytes(tmp_path: Path) -> None:
    catalog, extra = products(420), products(40, seed=9, prefix="d")
    spec = IndexSpec(factory="IVF4,RaBitQ2fs,Refine(SQ8)", dims=DIMS)
    found = []
    for number, (how, in_flight) in enumerate([(one_by_one, 1), (spread, 1), (spread, 2)]):
        store, work = Store.open(tmp_path / str(number)), tmp_path / "work"
        old, new = (replace(of(products, cuts=3), spread=how, in_flight=in_flight) for products in (catalog, extra))
        first = build_base(store, "s", old, spec, work=work)
        found.append((digests(first), digests(build_delta(store, "d", new, first, work=work))))
    assert found[0] == found[1] == found[2]


@EVERY
def test_positions_of_the_roster_are_the_ids_of_the_index(tmp_path: Path, factory: str) -> None:
    """Every entry's code is that of the product at its position."""
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path, factory)
    roster, index = read_roster(store, built), load_segment(store, built)
    vectors, parts = np.stack([products()[name] for name in roster.ids.to_pylist()]), pieces(index)
    found = encode(index, vectors)
    if built.spec.nlist is None:
        assert codes_of(parts.base).tobytes() == vectors.tobytes()
        return
    for number in range(built.spec.nlist):
        positions, codes = list_of(parts.base, number)
        assert positions.tolist() == np.flatnonzero(found.lists == number).tolist()
        assert codes.tobytes() == found.codes[positions].tobytes()
    if found.finer is not None:
        assert codes_of(parts.finer).tobytes() == found.finer.tobytes()


def test_training_sample_is_the_same_for_every_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than k-means reads: which ones it reads must follow from the set alone."""
    monkeypatch.setattr("pipelines.index.build.SAMPLE_PER_LIST", 50)
    monkeypatch.setattr("pipelines.index.build._LEAST_SAMPLE", 1)
    catalog, found = products(700), []
    spec = IndexSpec(factory="IVF2,Flat", dims=DIMS)
    for number in range(3):
        order = np.random.default_rng(number).permutation(700)
        found.append(build_base(Store.open(tmp_path / str(number)), "s", of(catalog, cuts=1 + number, order=order), spec, work=tmp_path))
    assert found[0].trained == found[1].trained == found[2].trained is not None
    monkeypatch.setattr("pipelines.index.build.SAMPLE_PER_LIST", 350)
    whole = build_base(Store.open(tmp_path / "whole"), "s", of(catalog), spec, work=tmp_path)
    assert whole.trained != found[0].trained


def test_numbers_are_hashed_once_more_without_a_clash() -> None:
    vids = np.arange(10_000, dtype=np.int64)
    assert len(np.unique(mixed(vids))) == 10_000
    # The smallest half by hash are not the smallest by number.
    assert 0.4 < (vids[np.argsort(mixed(vids))[:5000]] < 5000).mean() < 0.6


def test_card_says_what_the_lists_were_trained_on(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path, "IVF4,Flat")
    vectors = np.stack([*products().values()])
    template = template_of(store, built)
    centroids = template.quantizer.reconstruct_n(0, 4)
    nearest = (vectors @ centroids.T).max(axis=1)
    sizes = np.bincount((vectors @ centroids.T).argmax(axis=1), minlength=4)
    assert built.trained is not None
    assert built.trained.rows == 300
    assert built.trained.spread == built.spread == pytest.approx(1 - nearest.mean(), abs=2e-6)
    assert built.trained.imbalance == pytest.approx(4 * (sizes**2).sum() / 300**2, abs=1e-6)


@EVERY
def test_card_brings_back_what_was_built(tmp_path: Path, factory: str) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path / "work", factory)
    assert segments_of(store, manifest(built)) == [built]
    roster = read_roster(store, built)
    assert (np.diff(roster.vids) > 0).all()
    assert set(roster.ids.to_pylist()) == products().keys()
    assert load_segment(store, built).ntotal == 300


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "IVF4,PQ4x4fs,Refine(SQfp16)", "IVF4,RaBitQ2fs"])
def test_delta_uses_the_template_of_its_base(tmp_path: Path, factory: str) -> None:
    store = Store.open(tmp_path / "store")
    first = base(store, tmp_path, factory)
    delta = build_delta(store, "run-delta", of(products(3, seed=9, prefix="d")), first, work=tmp_path)
    assert (delta.kind, delta.template, delta.trained, delta.spec) == ("delta", "run-base", first.trained, first.spec)
    assert TRAINED not in [item.role for item in delta.objects]
    assert first.trained is not None
    want = first.trained.sha256
    assert trained_sha256(load_segment(store, delta)) == trained_sha256(load_segment(store, first)) == want
    assert trained_sha256(template_of(store, first)) == want
    assert segments_of(store, manifest(delta, first)) == [first, delta]


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
        build_delta(store, "run-delta", of(products(3)), built, work=tmp_path)


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
    built = base(store, tmp_path, "Flat")
    lie = ManifestObject.of(store.put("segments/run-base/index.faiss", content), role="faiss", rows=built.rows)
    limits = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    with pytest.raises(CorruptObject, match="not readable as a FAISS index"):
        load_segment(store, replace(built, objects=(lie, *(o for o in built.objects if o.role != "faiss"))))
    assert limits == (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit())


@pytest.mark.parametrize(
    ("factory", "metric", "dims", "count"),
    [
        ("Flat", faiss.METRIC_L2, DIMS, 300),
        ("Flat", faiss.METRIC_INNER_PRODUCT, DIMS, 299),
        ("Flat", faiss.METRIC_INNER_PRODUCT, DIMS * 2, 300),
        ("IDMap2,Flat", faiss.METRIC_INNER_PRODUCT, DIMS, 300),
        ("HNSW8", faiss.METRIC_INNER_PRODUCT, DIMS, 300),
        ("SQ8", faiss.METRIC_INNER_PRODUCT, DIMS, 300),
        ("Flat,Refine(SQ8)", faiss.METRIC_INNER_PRODUCT, DIMS, 300),
        ("IVF4,Flat", faiss.METRIC_INNER_PRODUCT, DIMS, 300),
    ],
)
def test_index_that_differs_from_its_card_is_refused(tmp_path: Path, factory: str, metric: int, dims: int, count: int) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path, "Flat")
    index: Any = faiss.index_factory(dims, factory, metric)
    vectors = unit(np.random.default_rng(0), count, dims)
    index.train(vectors)
    if factory.startswith("IDMap"):
        index.add_with_ids(vectors, np.arange(count))
    else:
        index.add(vectors)
    lie = ManifestObject.of(store.put("segments/run-base/index.faiss", faiss.serialize_index(index).tobytes()), role="faiss", rows=300)
    with pytest.raises(CorruptObject, match="expected"):
        load_segment(store, replace(built, objects=(lie,)))


def test_two_ids_with_one_number_are_refused_by_name(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")

    def colliding() -> Iterator[pa.Table]:
        for table in rows(products(10))():
            yield table.set_column(table.schema.get_field_index(VID), VID, pa.array([77] * len(table), pa.int64()))

    with pytest.raises(PlanError, match=r"'p0000[01]' and 'p0000[12]' share the number 77"):
        build_base(store, "s", Rows(pieces=[colliding], count=10), IndexSpec(factory="Flat", dims=DIMS), work=tmp_path)
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
        build_base(store, "s", Rows(pieces=[damaged], count=20), IndexSpec(factory="Flat", dims=DIMS), work=tmp_path)
    assert not [*store.list()]


def test_segment_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows"):
        build_base(Store.open(tmp_path), "s", of({}), IndexSpec(factory="Flat", dims=DIMS), work=tmp_path / "work")


def test_repeated_run_finds_its_own_bytes_and_refuses_others(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    first = base(store, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.*")}
    assert base(store, tmp_path) == first
    store.delete(first.object(CARD).key)
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
        base(Store.open(tmp_path / "store", faults=Race()), tmp_path, "Flat")
    assert theirs.read_bytes() == b"theirs"


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
def test_id_map_of_another_size_is_refused(tmp_path: Path, factory: str) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path, factory)
    table = pq.read_table(tmp_path / "store" / built.object(IDS).key)
    for number, damaged in enumerate(
        [table.slice(1), table.take(pa.array([*range(299), 298])), table.take(pa.array([1, 0, *range(2, 300)]))]
    ):
        path = tmp_path / f"ids-{number}.parquet"
        pq.write_table(damaged, path)
        lie = ManifestObject.of(store.put(built.object(IDS).key, path), role=IDS, rows=300)
        swapped = replace(built, objects=tuple(lie if item.role == IDS else item for item in built.objects))
        with pytest.raises(CorruptObject, match="expected 300 ascending numbers"):
            SegmentSearcher.open(store, manifest(swapped))


def test_index_with_positions_beyond_its_id_map_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    built = base(store, tmp_path, "IVF4,Flat")
    index = template_of(store, built)
    index.add_with_ids(np.stack([*products().values()]), np.arange(1000, 1300))
    lie = ManifestObject.of(store.put(built.object(FAISS).key, faiss.serialize_index(index).tobytes()), role=FAISS, rows=300)
    swapped = replace(built, objects=tuple(lie if item.role == FAISS else item for item in built.objects))
    with pytest.raises(CorruptObject, match="its id map does not"):
        SegmentSearcher.open(store, manifest(swapped)).search(unit(np.random.default_rng(0), 1), 3)


def test_column_names_are_those_of_the_schema(tmp_path: Path) -> None:
    built = base(Store.open(tmp_path / "store"), tmp_path)
    assert pq.read_schema(tmp_path / "store" / built.object(IDS).key).names == [VID, ID]
