"""Filtered searches of the table: as many answers as there are, wherever they lie; what passes is counted before, and remembered."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.schema import VECTOR, VID
from pipelines.stores.lance import TableSearcher, build, refresh_indexes
from pipelines.stores.lance.indexes import VECTOR_INDEX
from pipelines.stores.lance.searching import EXACT_ROWS
from pipelines.stores.lance.selectivity import SAMPLED_ROWS, Remembered
from pipelines.where import Expression, Filter, col
from tests.pipelines.lance_rows import DIMS, Place, bulk, local, spec_of

ROWS, ISLANDS, K = 12_000, 12, 10
PARTITIONS = 48
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sea:
    """A table of islands: far from each other, each of one size and one locale, in more partitions than there are islands."""

    place: Place
    version: int
    table: pa.Table

    def searcher(self, **how: Any) -> TableSearcher:
        return TableSearcher(self.place.uri, self.version, {}, **how)

    @property
    def vectors(self) -> Floats:
        return np.asarray(self.table.column(VECTOR).combine_chunks().flatten().to_numpy().reshape(-1, DIMS))

    def best(self, query: Floats, where: Filter | None = None) -> set[int]:
        """The numbers of the nearest that pass, by comparing everything."""
        scores = self.vectors @ query
        if where is not None:
            passing = self.table.filter(where.expression).column(VID).to_numpy()
            scores[~np.isin(self.table.column(VID).to_numpy(), passing)] = -9.0
        found: set[int] = set(self.table.column(VID).to_numpy()[np.argsort(-scores)[:K]].tolist())
        return found


@pytest.fixture(scope="module")
def sea(tmp_path_factory: pytest.TempPathFactory) -> Sea:
    place, spec = local(tmp_path_factory.mktemp("sea")), spec_of(vector_index="IVF_SQ")
    draw = np.random.default_rng(11)
    island = np.sort(draw.integers(0, ISLANDS, ROWS))
    centres = np.eye(DIMS, dtype=np.float32)[:ISLANDS]
    vectors = centres[island] + 0.08 * draw.standard_normal((ROWS, DIMS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = bulk(ROWS, spec)
    columns = {
        VECTOR: pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMS),
        "pieces": pa.array(island),
        "price": pa.array(draw.permutation(ROWS).astype(np.float64)),
        "stock": pa.array([None if number % 3 == 0 else number % 3 == 1 for number in range(ROWS)]),
    }
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), values)
    build(place.uri, [table], spec, place.options)
    refresh_indexes(place.uri, spec, place.options)
    dataset = lance.dataset(place.uri)
    dataset.create_index(VECTOR, "IVF_SQ", name=VECTOR_INDEX, metric="cosine", replace=True, num_partitions=PARTITIONS)
    return Sea(place=place, version=int(lance.dataset(place.uri).version), table=table)


def recall(sea: Sea, searcher: TableSearcher, where: Filter | None, queries: Floats, **how: Any) -> float:
    hits = 0
    for query in queries:
        found = searcher.nearest(query, K, where=where, **how).column(VID).to_pylist()
        assert len(found) == len(set(found)) == K
        hits += len(set(found) & sea.best(query, where))
    return hits / K / len(queries)


def test_all_that_pass_are_found_on_an_island_far_from_every_query(sea: Sea) -> None:
    searcher = sea.searcher(nprobes=1)
    where = (col("pieces") == ISLANDS - 1).filter(searcher.columns)
    assert searcher.estimate(where).rows > EXACT_ROWS
    queries = sea.vectors[np.flatnonzero(sea.table.column("pieces").to_numpy() != ISLANDS - 1)[::400]]
    assert recall(sea, searcher, where, queries) >= 0.97


def test_k_answers_come_while_k_rows_pass_and_all_of_them_after_that(sea: Sea) -> None:
    searcher = sea.searcher(nprobes=1, refine=1)
    query = sea.vectors[0]
    for built, rows in (
        (col("price") < 7, 7),
        (col("price") < EXACT_ROWS + 50, EXACT_ROWS + 50),
        ((col("pieces") == ISLANDS - 1) & (col("price") < ROWS // 2), None),
        (col("price") < 0, 0),
    ):
        where = built.filter(searcher.columns)
        wanted = set(sea.table.filter(where.expression).column(VID).to_pylist())
        assert rows in (None, len(wanted))
        for k in (1, K, len(wanted), len(wanted) + 5):
            found = searcher.nearest(query, max(1, k), where=where).column(VID).to_pylist()
            assert len(found) == len(set(found)) == min(max(1, k), len(wanted))
            assert set(found) <= wanted
    assert searcher.nearest(query, ROWS + 1).num_rows == ROWS


def test_few_rows_are_all_compared_however_few_partitions_are_searched(sea: Sea) -> None:
    searcher = sea.searcher(nprobes=1, refine=1)
    where = (col("price") < EXACT_ROWS).filter(searcher.columns)
    assert recall(sea, searcher, where, sea.vectors[::600]) == 1.0


def test_filters_that_know_nothing_of_the_vectors_find_as_much_at_every_share(sea: Sea) -> None:
    searcher = sea.searcher(nprobes=4)
    for rows in (ROWS // 2, ROWS // 8, EXACT_ROWS + 1, 100):
        where = (col("price") < rows).filter(searcher.columns)
        assert recall(sea, searcher, where, sea.vectors[::500]) >= 0.97


def test_probes_are_those_of_the_constructor_unless_a_call_says_otherwise(sea: Sea) -> None:
    queries = sea.vectors[::300]
    one, most = sea.searcher(nprobes=1, refine=1), sea.searcher(nprobes=PARTITIONS, refine=10)
    assert recall(sea, one, None, queries) < 0.98
    assert recall(sea, most, None, queries) > 0.99
    assert recall(sea, one, None, queries, nprobes=PARTITIONS, refine=10) == recall(sea, most, None, queries)
    assert recall(sea, most, None, queries, nprobes=1, refine=1) == recall(sea, one, None, queries)
    for how in ({"nprobes": 0}, {"refine": 0}):
        with pytest.raises(InputError, match="1 or more"):
            sea.searcher(**how)


WHERES: list[Expression] = [
    col("price") < 30,
    col("price") < ROWS // 2,
    ~(col("price") < 30),
    col("stock").is_null(),
    col("stock") == True,  # noqa: E712
    (col("stock") == True).or_null(),  # noqa: E712
    ~col("brand").is_in([f"brand {number}" for number in range(40)]),
    (col("pieces") == 3) & (col("price") < 100),
    col("price") < 0,
]


@pytest.mark.parametrize("built", WHERES, ids=repr)
@pytest.mark.parametrize("nulls", ["drop", "keep"])
def test_an_estimate_is_near_the_count_and_a_count_where_few_rows_pass(sea: Sea, built: Expression, nulls: Any) -> None:
    searcher = sea.searcher()
    where = built.filter(searcher.columns, nulls=nulls)
    truth = sea.table.filter(where.expression).num_rows
    found = searcher.estimate(where)
    assert found.counted == (found.rows == truth) or abs(found.rows - truth) > 0
    assert abs(found.rows - truth) <= (0 if found.counted else 0.2 * truth)
    assert found.counted or truth > 64 * ROWS / SAMPLED_ROWS / 2
    assert len(searcher.matching(where)) == truth


def test_the_sample_is_the_rows_of_the_smallest_numbers(sea: Sea) -> None:
    sample = sea.searcher().sample()
    numbers = sample.column(VID).to_numpy()
    assert 0.8 * SAMPLED_ROWS < len(numbers) < 1.2 * SAMPLED_ROWS
    assert numbers.tolist() == sorted(sea.table.column(VID).to_pylist())[: len(numbers)]
    assert VECTOR not in sample.column_names


def test_what_passes_is_asked_once_and_cannot_be_changed(sea: Sea) -> None:
    searcher = sea.searcher()
    first = searcher.matching((col("price") < 100).filter(searcher.columns))
    assert searcher.matching((100 > col("price")).filter(searcher.columns)) is first  # noqa: SIM300  another spelling
    assert searcher.matching((col("price") < 101).filter(searcher.columns)) is not first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


@settings(max_examples=200, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=60),
    entries=st.integers(1, 4),
    most=st.integers(0, 60),
)
def test_what_is_remembered_is_bounded_and_right(asked: list[tuple[int, int]], entries: int, most: int) -> None:
    sizes = dict(reversed(asked))
    held: Remembered[bytes] = Remembered(entries=entries, max_bytes=most, size=len)
    for number, _ in asked:
        answer = bytes([number]) * sizes[number]
        assert held.get(bytes([number]), partial(bytes, answer)) == answer
        kept = [*held._held.values()]
        assert len(kept) <= entries
        assert sum(map(len, kept)) == held._bytes <= most
        assert (sizes[number] > most) or kept[-1] == answer


def test_many_threads_remember_one_answer() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        held: Remembered[int] = Remembered(entries=5, max_bytes=20, size=lambda _: 3)
        with ThreadPoolExecutor(max_workers=8) as pool:
            found = [*pool.map(lambda number: held.get(bytes([number % 9]), lambda: number % 9), range(5000))]
    finally:
        sys.setswitchinterval(before)
    assert found == [number % 9 for number in range(5000)]
    assert held._bytes == 3 * len(held._held)
