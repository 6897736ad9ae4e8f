"""Codes and lists: what a row becomes follows from the template and the row alone, for every kind of index there is."""

from __future__ import annotations

from functools import cache
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.index.lists import (
    Encoded,
    append_codes,
    assign,
    by_list,
    centroids_of,
    codes_of,
    difference,
    encode,
    fill,
    imbalance,
    laid_out,
    list_of,
    pieces,
    sizes_of,
    trained,
    trained_sha256,
)
from pipelines.index.spec import IndexSpec
from tests.pipelines.index_nights import DIMS, FACTORIES, Floats, unit

EVERY = pytest.mark.parametrize("factory", FACTORIES)
LISTED = pytest.mark.parametrize("factory", [factory for factory in FACTORIES if factory != "Flat"])
VECTORS = unit(np.random.default_rng(21), 700)


def spec(factory: str, dims: int = DIMS) -> IndexSpec:
    return IndexSpec(factory=factory, dims=dims)


@cache
def template(factory: str) -> Any:
    """One trained, empty index of each kind for the whole module: encoding must not change it."""
    return trained(spec(factory), VECTORS)


def copied(factory: str) -> Any:
    return faiss.clone_index(template(factory))


def stacked(found: list[Encoded]) -> list[Any]:
    columns: list[list[Any]] = [[one.lists for one in found], [one.codes for one in found]]
    finer = [one.finer for one in found if one.finer is not None]
    return [np.concatenate(column) for column in (*columns, finer) if column]


@EVERY
def test_a_row_alone_is_encoded_as_in_any_batch(factory: str) -> None:
    index = template(factory)
    before = trained_sha256(index)
    whole = encode(index, VECTORS)
    rng = np.random.default_rng(3)
    for cuts in ([], sorted(rng.choice(700, 9, replace=False).tolist()), list(range(500, 700))):
        parts = [encode(index, part) for part in np.split(VECTORS, cuts)]
        for one, other in zip(stacked([whole]), stacked(parts), strict=True):
            assert one.tobytes() == other.tobytes()
        np.testing.assert_allclose(np.concatenate([part.closeness for part in parts]), whole.closeness, atol=1e-12)
    order = rng.permutation(700)
    for one, other in zip(stacked([whole]), stacked([encode(index, VECTORS[order])]), strict=True):
        assert one[order].tobytes() == other.tobytes()
    assert trained_sha256(index) == before
    assert pieces(index).base.ntotal == 0


@EVERY
def test_threads_change_no_code(factory: str) -> None:
    before, found = faiss.omp_get_max_threads(), []
    try:
        for threads in (1, 4):
            faiss.omp_set_num_threads(threads)
            found.append(stacked([encode(template(factory), VECTORS)]))
    finally:
        faiss.omp_set_num_threads(before)
    assert [part.tobytes() for part in found[0]] == [part.tobytes() for part in found[1]]


@EVERY
def test_codes_are_those_that_faiss_would_store(factory: str) -> None:
    """Filled by us or added by FAISS: the same lists."""
    ours, theirs = copied(factory), copied(factory)
    found = encode(ours, VECTORS)
    if factory == "Flat":
        append_codes(ours, found.codes)
    else:
        fill(ours, by_list(found.lists, found.codes), rows=700)
    if found.finer is not None:
        append_codes(pieces(ours).finer, found.finer)
        ours.ntotal = 700
    theirs.add(VECTORS)
    assert faiss.serialize_index(ours).tobytes() == faiss.serialize_index(theirs).tobytes()


@EVERY
def test_an_entry_takes_the_bytes_that_its_spec_says(factory: str) -> None:
    index, wanted = template(factory), spec(factory)
    parts = pieces(index)
    assert parts.base.code_size == wanted.code_bytes
    finer = parts.finer.code_size if parts.finer is not None else 0
    assert wanted.entry_bytes == wanted.code_bytes + finer + (8 if wanted.nlist else 0)
    assert difference(index, wanted) is None


@pytest.mark.parametrize(
    ("factory", "dims"), [("IVF2,PQ5x4fs", 15), ("IVF2,RaBitQfs", 20), ("IVF2,RaBitQ3fs", 21), ("IVF2,RaBitQ8fs", 9), ("IVF2,SQ8", 7)]
)
def test_odd_dimensions_take_the_bytes_that_the_spec_says(factory: str, dims: int) -> None:
    sample = unit(np.random.default_rng(0), 200, dims)
    index = trained(spec(factory, dims), sample)
    assert encode(index, sample).codes.shape == (200, spec(factory, dims).code_bytes)
    assert pieces(index).base.code_size == spec(factory, dims).code_bytes


@EVERY
def test_an_index_of_one_kind_is_no_other(factory: str) -> None:
    same = [other for other in FACTORIES if difference(template(factory), spec(other)) is None]
    assert same == [factory]
    assert difference(template(factory), spec(factory, DIMS * 2)) == f"expected {DIMS * 2} dimensions, found {DIMS}"


def test_an_index_of_distances_is_refused() -> None:
    assert difference(faiss.index_factory(DIMS, "Flat", faiss.METRIC_L2), spec("Flat")) == "expected the inner product, found metric 1"


@LISTED
def test_hash_of_a_template_follows_its_centroids_and_quantisers(factory: str) -> None:
    filled, other = copied(factory), trained(spec(factory), VECTORS[:400])
    filled.add(VECTORS[:50])
    assert trained_sha256(filled) == trained_sha256(template(factory)) != trained_sha256(other)


@LISTED
def test_hashes_of_two_kinds_of_template_differ(factory: str) -> None:
    assert [other for other in FACTORIES if trained_sha256(template(other)) == trained_sha256(template(factory))] == [factory]


def test_flat_has_no_template_to_hash() -> None:
    assert trained_sha256(template("Flat")) is None


@LISTED
def test_threads_train_the_same_template(factory: str) -> None:
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        assert trained_sha256(trained(spec(factory), VECTORS)) == trained_sha256(template(factory))
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


def test_too_few_rows_train_nothing() -> None:
    with pytest.raises(InputError, match="3 rows cannot train the lists of IVF4,SQ8"):
        trained(spec("IVF4,SQ8"), VECTORS[:3])


def rivals(gap: float) -> tuple[Any, Floats]:
    """A quantiser with two centroids that are this far apart, and one that is far from both."""
    first = VECTORS[0]
    second = first.copy()
    second[0] += gap
    quantizer = faiss.IndexFlatIP(DIMS)
    quantizer.add(np.stack([second, -first, first]))
    return quantizer, centroids_of(quantizer)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(0, 600), max_size=12), gap=st.sampled_from([0.0, 1e-7, 1e-6, 1e-5, 3e-5]))
def test_lists_of_near_tied_centroids_do_not_depend_on_the_batch(seed: int, cuts: list[int], gap: float) -> None:
    quantizer, centroids = rivals(gap)
    block = unit(np.random.default_rng(seed), 600)
    want = [int((centroids.astype(np.float64) * row.astype(np.float64)).sum(axis=1).argmax()) for row in block]
    parts = np.split(block, sorted(cuts))
    assert np.concatenate([assign(quantizer, part) for part in parts]).tolist() == want
    assert np.concatenate([assign(quantizer, row[None]) for row in block[:20]]).tolist() == want[:20]


def test_the_first_of_equal_centroids_is_taken() -> None:
    quantizer, _ = rivals(0.0)
    lists = assign(quantizer, VECTORS)
    assert set(lists.tolist()) == {0, 1}


def test_lists_are_the_nearest_centroids() -> None:
    centroids = centroids_of(template("IVF8,Flat").quantizer)
    assert assign(template("IVF8,Flat").quantizer, VECTORS).tolist() == (VECTORS @ centroids.T).argmax(axis=1).tolist()
    assert assign(template("IVF8,Flat").quantizer, VECTORS[:0]).tolist() == []


def test_more_rows_than_one_block_are_assigned_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = assign(template("IVF8,Flat").quantizer, VECTORS)
    monkeypatch.setattr("pipelines.index.lists._ROWS_AT_ONCE", 13)
    assert assign(template("IVF8,Flat").quantizer, VECTORS).tolist() == whole.tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60))
def test_lists_come_once_and_their_positions_ascend(chosen: list[int]) -> None:
    lists = np.array(chosen, np.int32)
    codes = np.arange(len(lists), dtype=np.uint8)[:, None]
    found = [*by_list(lists, codes)] if len(lists) else []
    assert [number for number, _, _ in found] == sorted(set(chosen))
    for number, positions, block in found:
        assert positions.tolist() == [at for at, one in enumerate(chosen) if one == number]
        assert block[:, 0].tolist() == positions.tolist()


def test_lists_and_codes_come_back_as_they_were_put() -> None:
    index = copied("IVF4,SQ8,Refine(SQfp16)")
    index.add(VECTORS)
    found, base = encode(template("IVF4,SQ8,Refine(SQfp16)"), VECTORS), pieces(index).base
    assert sizes_of(base).tolist() == np.bincount(found.lists, minlength=4).tolist()
    for number in range(4):
        positions, codes = list_of(base, number)
        assert positions.tolist() == np.flatnonzero(found.lists == number).tolist()
        assert codes.tobytes() == found.codes[positions].tobytes()
    assert found.finer is not None
    assert codes_of(pieces(index).finer).tobytes() == found.finer.tobytes()
    assert list_of(pieces(template("IVF4,SQ8")).base, 2)[1].shape == (0, DIMS)
    assert codes_of(template("Flat")).shape == (0, DIMS * 4)
    assert sizes_of(template("Flat")).tolist() == [0]


@LISTED
def test_layout_for_fast_scans_holds_the_same_entries(factory: str) -> None:
    if not spec(factory).fast:
        return
    index = pieces(copied(factory.partition(",Refine")[0])).base
    index.add(VECTORS)
    fast = laid_out(index)
    assert (fast.ntotal, sizes_of(fast).tolist()) == (700, sizes_of(index).tolist())
    fast.nprobe = 8
    found = fast.search(VECTORS[:5], 700)[1]
    assert {tuple(sorted(row.tolist())) for row in found} == {tuple(range(700))}


def test_imbalance_of_even_lists_is_one_and_of_a_single_full_one_their_number() -> None:
    assert imbalance(np.array([5, 5, 5, 5])) == 1.0
    assert imbalance(np.array([20, 0, 0, 0])) == 4.0
    assert imbalance(np.array([0, 0])) == 1.0
    assert imbalance(np.array([3, 1])) == pytest.approx(1.25)
