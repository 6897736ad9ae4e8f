"""The vector index lives for months: built by workers, extended, folded, retrained, compacted, measured. No step loses a row."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lance
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from pipelines.contracts import one_by_one
from pipelines.errors import AlreadyExists, InputError, StoreError
from pipelines.hashes import id_hashes
from pipelines.index.tuning import Exam
from pipelines.schema import ID, ID_HASH, VECTOR, VID
from pipelines.stores.lance import (
    TableSearcher,
    TableSpec,
    Workers,
    apply,
    build,
    commit_build,
    compacting,
    distributed,
    fold_vector_index,
    index_state,
    indexes,
    opening,
    pin,
    read_rows,
    refresh_indexes,
    restore,
    retrain_vector_index,
    rows_digest,
    sizes,
    take,
    vector_health,
    write_fragments,
)
from pipelines.stores.lance.digest import DIGESTED
from pipelines.table_tuning import tune
from pipelines.workers import spread
from tests.pipelines.lance_rows import DIMS, Place, bulk, local, remote, spec_of

INDEX = f"{VECTOR}_idx"
BIG = spec_of(distribute_above=1000, scalar=("stock",), text=())
ONE = spec_of(vector_index="IVF_FLAT", scalar=("stock",), text=())

Floats = npt.NDArray[np.float32]


@pytest.fixture
def disk(tmp_path: Path) -> Place:
    return local(tmp_path)


@pytest.fixture(autouse=True)
def _small_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_PARTITION_ROWS", 100)


def unit(rng: np.random.Generator, count: int) -> Floats:
    """Return random vectors of length one, loosely around a few centres: hard enough that few partitions miss answers."""
    centres = np.random.default_rng(12).standard_normal((12, DIMS))
    vectors = centres[rng.integers(0, 12, count)] + 4 * rng.standard_normal((count, DIMS))
    made: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return made


def clustered(number: int, spec: TableSpec, *, seed: int = 0, prefix: str = "bulk") -> pa.Table:
    """Return products with such vectors."""
    table = bulk(number, spec_of()).cast(spec.schema)
    ids = pa.array([f"{prefix}-{index}" for index in range(number)])
    hashes = id_hashes(ids)
    flat = unit(np.random.default_rng(seed), number).ravel().astype(spec.schema.field(VECTOR).type.value_type.to_pandas_dtype())
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), DIMS)
    numbers = np.frombuffer(hashes.buffers()[1], dtype="<i8")[::2][:number] & np.int64(2**63 - 1)
    columns: dict[str, Any] = {ID: ids, ID_HASH: hashes, VID: pa.array(numbers), VECTOR: vectors}
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), spec.schema.field(name), column)
    return table


def fragmented(place: Place, table: pa.Table, spec: TableSpec, pieces: int) -> int:
    """Commit a table of so many fragments."""
    size = -(-table.num_rows // pieces)
    written = [item for start in range(0, table.num_rows, size) for item in write_fragments(place.uri, table.slice(start, size), spec, {})]
    return commit_build(place.uri, written, spec, {})


def vectors_in(table: pa.Table) -> Floats:
    return np.asarray(table.column(VECTOR).combine_chunks().values, dtype=np.float32).reshape(-1, DIMS)


def questions(count: int) -> Floats:
    return unit(np.random.default_rng(99), count)


def answers(place: Place, version: int, *, nprobes: int = 4, count: int = 30) -> list[dict[str, list[Any]]]:
    searcher = TableSearcher(place.uri, version, {})
    return [searcher.nearest(query, 10, nprobes=nprobes).to_pydict() for query in questions(count)]


def recall(place: Place, version: int, **how: Any) -> float:
    searcher = TableSearcher(place.uri, version, {})
    exact = [set(searcher.nearest(query, 10, exact=True).column(ID).to_pylist()) for query in questions(30)]
    found = answers(place, version, **how)
    return float(np.mean([len(one & set(other[ID])) / 10 for one, other in zip(exact, found, strict=True)]))


def latest(place: Place) -> int:
    return int(lance.dataset(place.uri).version)


def kind(place: Place) -> str:
    return str(next(index.index_type for index in lance.dataset(place.uri).describe_indices() if index.name == INDEX))


def upserted(place: Place, table: pa.Table, spec: TableSpec, *, live: int) -> int:
    return apply(place.uri, upserts=[table], attrs=[], deletes=[], spec=spec, options={}, expect_live=live)


@pytest.mark.parametrize(("metric", "vector"), [("cosine", "float32"), ("dot", "float32"), ("cosine", "float16")])
def test_any_groups_of_fragments_give_the_same_answers_as_one(disk: Place, tmp_path: Path, metric: str, vector: str) -> None:
    spec = spec_of(distribute_above=1000, metric=metric, vector=vector, scalar=(), text=())
    table = clustered(3000, spec)
    found, centres = [], []
    for number, rows in enumerate((1, 700, 10**6)):
        place = local(tmp_path / str(number))
        version = fragmented(place, table, spec, 9)
        state = refresh_indexes(place.uri, spec, {}, at=version, workers=Workers(group_rows=rows))
        assert (state.built[-1], state.unindexed[INDEX], kind(place)) == (INDEX, 0, "IVF_FLAT")
        assert state.deltas[INDEX] == (4, 3, 1)[number]
        found.append(answers(place, state.version))
        centres.append(lance.dataset(place.uri).centroids(index_name=INDEX).to_pylist())
    assert found[0] == found[1] == found[2]
    assert metric == "dot" or recall(local(tmp_path / "0"), state.version) < 1
    assert centres[0] == centres[1] == centres[2]
    fragmented(disk, table, spec, 9)
    lance.dataset(disk.uri).create_index(VECTOR, "IVF_FLAT", name=INDEX, metric=metric, replace=True, num_partitions=30)
    assert recall(local(tmp_path / "0"), latest(local(tmp_path / "0"))) > recall(disk, latest(disk)) - 0.05


@dataclass(frozen=True)
class DyingOnce:
    """Kills the worker that first calls the function."""

    function: Callable[..., Any]
    mark: Path

    def __call__(self, *arguments: Any) -> Any:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.function(*arguments)


@pytest.mark.usefixtures("ray_cluster")
def test_one_worker_and_two_of_which_one_dies_give_the_same_answers_as_none(tmp_path: Path) -> None:
    def dying(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, in_flight: int) -> Iterator[Any]:
        once = DyingOnce(function, tmp_path / "mark")

        def called(*given: Any) -> Any:
            return once(*given)

        return spread(called, arguments, in_flight=in_flight)

    table = clustered(3000, BIG)
    found = []
    for number, workers in enumerate(
        (
            Workers(group_rows=500),
            Workers(group_rows=500, spread=spread, in_flight=1),
            Workers(group_rows=700, spread=dying, in_flight=2),
        )
    ):
        place = local(tmp_path / str(number))
        state = refresh_indexes(place.uri, BIG, {}, at=fragmented(place, table, BIG, 6), workers=workers)
        assert (state.unindexed[INDEX], kind(place)) == (0, "IVF_FLAT")
        found.append(answers(place, state.version))
    assert (tmp_path / "mark").exists()
    assert found[0] == found[1] == found[2]


def test_a_build_that_dies_before_its_commit_changes_nothing_and_runs_again(disk: Place) -> None:
    class Killed(BaseException):
        """Stands for the end of the process."""

    calls = 0

    def killed(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, in_flight: int) -> Iterator[Any]:
        nonlocal calls
        calls += 1
        yield from one_by_one(function, arguments, in_flight=in_flight)
        if calls == 2:
            raise Killed

    ready = refresh_indexes(
        disk.uri, spec_of(vector_index="none", scalar=("stock",), text=()), {}, at=fragmented(disk, clustered(3000, BIG), BIG, 6)
    )
    before = answers(disk, ready.version)
    with pytest.raises(Killed):
        refresh_indexes(disk.uri, BIG, {}, at=ready.version, workers=Workers(spread=killed, group_rows=500))
    assert latest(disk) == ready.version
    assert answers(disk, ready.version) == before
    state = refresh_indexes(disk.uri, BIG, {}, at=ready.version, workers=Workers(group_rows=500))
    assert (state.version, state.built, state.unindexed[INDEX]) == (ready.version + 1, (INDEX,), 0)


def test_a_build_beside_another_commit_is_refused(disk: Place) -> None:
    def beside(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, in_flight: int) -> Iterator[Any]:
        yield from one_by_one(function, arguments, in_flight=in_flight)
        upserted(disk, clustered(1, BIG, prefix="other"), BIG, live=3001)

    ready = refresh_indexes(
        disk.uri, spec_of(vector_index="none", scalar=("stock",), text=()), {}, at=fragmented(disk, clustered(3000, BIG), BIG, 3)
    )
    for at in (ready.version, None):
        with pytest.raises(AlreadyExists, match="another run writes it"):
            refresh_indexes(disk.uri, BIG, {}, at=at, workers=Workers(spread=beside, group_rows=1000))
        assert INDEX not in index_state(disk.uri, options={}).deltas
        restore(disk.uri, version=ready.version, options={})


def test_a_segment_that_a_worker_lost_is_missed(disk: Place) -> None:
    def losing(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, in_flight: int) -> Iterator[Any]:
        yield from [*one_by_one(function, arguments, in_flight=in_flight)][:-1]

    version = fragmented(disk, clustered(3000, BIG), BIG, 6)
    with pytest.raises(StoreError, match="the workers indexed 4 fragments"):
        refresh_indexes(disk.uri, BIG, {}, at=version, workers=Workers(spread=losing, group_rows=1))
    assert INDEX not in index_state(disk.uri, options={}).deltas


def test_a_partition_of_nothing_moves_to_what_is_worst_placed() -> None:
    sample = np.array([[1, 0], [0.9, 0.1], [0, 1], [-1, 0]], np.float32)
    moved = distributed._moved(sample, np.array([[1, 0], [1, 0], [0, 1]], np.float32))
    assert moved == pytest.approx(np.array([[0.95, 0.05], [-1, 0], [-0.5, 0.5]]))


def test_products_with_one_text_can_be_indexed_by_workers(disk: Place) -> None:
    spec = spec_of(distribute_above=1000, scalar=(), text=())
    table = clustered(2000, spec)
    alike = table.column(VECTOR).combine_chunks().take(pa.array([0] * 1990 + [*range(10)]))
    table = table.set_column(table.schema.get_field_index(VECTOR), spec.schema.field(VECTOR), alike)
    state = refresh_indexes(disk.uri, spec, {}, at=fragmented(disk, table, spec, 4), workers=Workers(group_rows=1))
    health = vector_health(disk.uri, state.version, {})
    assert health is not None
    assert (health.partitions, sum(health.piece_rows)) == (20, 2000)
    assert health.largest >= 1990
    found = TableSearcher(disk.uri, state.version, {}).nearest(vectors_in(table)[1995], 1, nprobes=20)
    assert found.column("score").to_numpy() == pytest.approx([1.0])


def test_pieces_of_workers_stay_while_the_deltas_behind_them_are_folded(disk: Place) -> None:
    spec = spec_of(distribute_above=1000, fold_after=4, scalar=(), text=())
    version = fragmented(disk, clustered(4000, spec), spec, 4)
    state = refresh_indexes(disk.uri, spec, {}, at=version, workers=Workers(group_rows=1))
    pieces, folds = [state.deltas[INDEX]], []
    for night in range(6):
        version = upserted(disk, clustered(40, spec, seed=night, prefix=f"n{night}"), spec, live=4040 + 40 * night)
        state = refresh_indexes(disk.uri, spec, {}, at=version)
        assert state.unindexed[INDEX] == 0
        pieces.append(state.deltas[INDEX])
        folds.append(INDEX in state.folded)
        health = vector_health(disk.uri, state.version, {})
        assert health is not None
        assert health.piece_rows[:2] == (2000, 2000)
    assert (pieces, folds) == ([2, 3, 4, 3, 4, 3, 4], [False, False, True, False, True, False])
    assert recall(disk, state.version, nprobes=40) == 1.0


def test_a_fold_and_a_retraining_are_one_commit_each_and_the_old_version_stays(disk: Place) -> None:
    spec = spec_of(scalar=(), text=())
    version = refresh_indexes(disk.uri, spec, {}, at=fragmented(disk, clustered(2000, spec), spec, 1)).version
    for night in range(3):
        version = refresh_indexes(
            disk.uri, spec, {}, at=upserted(disk, clustered(200, spec, seed=night + 1, prefix=f"n{night}"), spec, live=2200 + 200 * night)
        ).version
    published, seen = version, answers(disk, version)
    assert index_state(disk.uri, options={}).deltas[INDEX] == 4
    folded = fold_vector_index(disk.uri, {}, at=published)
    assert (folded.version, folded.folded, folded.deltas[INDEX], folded.unindexed[INDEX]) == (published + 1, (INDEX,), 1, 0)
    again = fold_vector_index(disk.uri, {}, at=folded.version)
    assert (again.version, again.folded) == (folded.version, ())
    made = retrain_vector_index(disk.uri, spec, {}, at=again.version)
    assert (made.version, made.built, made.deltas[INDEX], made.unindexed[INDEX]) == (again.version + 1, (INDEX,), 1, 0)
    assert made.deltas.keys() == again.deltas.keys()
    assert retrain_vector_index(disk.uri, spec, {}, at=made.version).version == made.version + 1
    for stale in (published, made.version):
        with pytest.raises(AlreadyExists):
            fold_vector_index(disk.uri, {}, at=stale)
        with pytest.raises(AlreadyExists):
            retrain_vector_index(disk.uri, spec, {}, at=stale)
    assert answers(disk, published) == seen
    assert recall(disk, latest(disk), nprobes=20) > 0.95


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_retraining_of_a_big_table_is_the_workers_build(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = local(tmp_path) if where == "local" else remote(request.getfixturevalue("s3"))
    build(place.uri, [clustered(3000, ONE)], ONE, place.options)
    upserts = clustered(1500, ONE, prefix="more")
    version = apply(place.uri, upserts=[upserts], attrs=[], deletes=[], spec=ONE, options=place.options, expect_live=4500)
    first = refresh_indexes(place.uri, ONE, place.options, at=version)
    made = retrain_vector_index(place.uri, BIG, place.options, at=first.version, workers=Workers(group_rows=1))
    assert (made.version, made.built, made.deltas[INDEX]) == (first.version + 1, (INDEX,), 2)
    assert fold_vector_index(place.uri, place.options, at=made.version).deltas[INDEX] == 1
    health = vector_health(place.uri, made.version, place.options)
    assert health is not None
    assert (health.partitions, health.piece_rows) == (45, (3000, 1500))


def test_a_table_without_a_vector_index_has_nothing_to_fold_retrain_or_report(disk: Place) -> None:
    spec = spec_of(scalar=(), text=())
    version = refresh_indexes(disk.uri, spec, {}, at=fragmented(disk, clustered(100, spec), spec, 1)).version
    assert fold_vector_index(disk.uri, {}, at=version).version == version
    assert retrain_vector_index(disk.uri, spec, {}, at=version).version == version
    assert vector_health(disk.uri, version, {}) is None


def test_health_counts_what_is_in_each_partition(disk: Place) -> None:
    spec = spec_of(distribute_above=1000, scalar=(), text=())
    table = clustered(3000, spec)
    version = refresh_indexes(disk.uri, spec, {}, at=fragmented(disk, table, spec, 2), workers=Workers(group_rows=1)).version
    version = refresh_indexes(disk.uri, spec, {}, at=upserted(disk, clustered(7, spec, prefix="new"), spec, live=3007)).version
    health = vector_health(disk.uri, version, {})
    assert health is not None
    centres = np.asarray(lance.dataset(disk.uri).centroids(index_name=INDEX).values).reshape(30, DIMS)
    vectors = np.vstack([vectors_in(table), vectors_in(clustered(7, spec, prefix="new"))])
    expected = np.bincount((vectors @ centres.T - (centres**2).sum(axis=1) / 2).argmax(axis=1), minlength=30)
    assert (health.kind, health.partitions, health.unindexed, health.deltas) == ("IVF_FLAT", 30, 0, 2)
    assert health.piece_rows == (1500, 1500, 7)
    assert health.largest == expected.max()
    assert health.imbalance == pytest.approx(30 * float((expected.astype(float) ** 2).sum()) / 3007**2)
    assert sum(health.sizes) == 30
    assert health.sizes[7] == int(((expected > 64) & (expected <= 128)).sum())


def exam_of(table: pa.Table, queries: Floats, k: int = 10) -> Exam:
    vectors, numbers = vectors_in(table), table.column(VID).to_numpy()
    scores = queries @ vectors.T
    best = np.argsort(-scores, axis=1)[:, :k]
    order = np.argsort(numbers)

    def score_of(found: npt.NDArray[np.int64]) -> Floats:
        at = order[np.minimum(np.searchsorted(numbers[order], found), len(order) - 1)]
        return np.where(numbers[at] == found, np.take_along_axis(scores, at, axis=1), -np.inf).astype(np.float32)

    return Exam(queries=queries, vids=numbers[best], scores=np.take_along_axis(scores, best, axis=1), score_of=score_of)


def test_tuning_finds_the_fewest_partitions_that_reach_the_target_on_a_real_table(disk: Place) -> None:
    table = clustered(3000, BIG)
    version = refresh_indexes(disk.uri, BIG, {}, at=fragmented(disk, table, BIG, 1)).version
    nearest = TableSearcher(disk.uri, version, {}).nearest
    exam = exam_of(table, questions(40))
    ladder = (1, 2, 4, 8, 16, 32)
    chosen = tune(nearest, exam, target=0.94, margin=0.01, nprobes=ladder, refines=(1,))
    reaching = [probes for probes in ladder if tune(nearest, exam, target=0, margin=0, nprobes=[probes], refines=[1]).recall >= 0.95]
    assert (chosen.reached, chosen.nprobes, chosen.refine) == (True, reaching[0], 1)
    assert chosen.nprobes > 1
    assert chosen.recall >= 0.95
    assert chosen.p50_ms > 0


def ladder_of(
    found: Callable[[int, int], int], *, cost: Callable[[int, int], float]
) -> tuple[Any, Callable[[], float], list[tuple[int, int]]]:
    """Return a search that finds so many of ten answers, the clock of what it costs, and what was asked of it."""
    now, asked = 0.0, []

    def nearest(_: Any, k: int, *, nprobes: int, refine: int) -> pa.Table:
        nonlocal now
        now += cost(nprobes, refine)
        asked.append((nprobes, refine))
        right = found(nprobes, refine)
        return pa.table({VID: [*range(right), *range(100, 100 + k - right)]})

    return nearest, lambda: now, asked


def plain_exam(queries: int = 3) -> Exam:
    scores = np.tile(np.linspace(1, 0.1, 10, dtype=np.float32), (queries, 1))
    vids = np.tile(np.arange(10), (queries, 1))
    return Exam(
        queries=np.ones((queries, 4), np.float32),
        vids=vids,
        scores=scores,
        score_of=lambda found: np.where(found < 10, 1.0 - found / 11, -np.inf).astype(np.float32),
    )


def _cost(each: float, nprobes: int, refine: int) -> float:
    return nprobes * 0.001 + refine * each


def test_tuning_trades_partitions_for_scoring_where_that_is_faster() -> None:
    def found(nprobes: int, refine: int) -> int:
        return 10 if nprobes * refine >= 160 else 8

    for refine_cost, expected in ((0.0, (10, 16)), (0.004, (40, 4)), (9.0, (160, 1))):
        nearest, clock, asked = ladder_of(found, cost=partial(_cost, refine_cost))
        chosen = tune(nearest, plain_exam(), target=0.99, clock=clock)
        assert (chosen.nprobes, chosen.refine, chosen.recall, chosen.reached) == (*expected, 1.0, True)
        assert len(set(asked)) <= 14


def test_a_target_out_of_reach_is_reported_with_the_best_found() -> None:
    nearest, clock, _ = ladder_of(lambda nprobes, refine: 9 if nprobes >= 40 and refine >= 2 else 7, cost=lambda *_: 0.001)
    chosen = tune(nearest, plain_exam(), target=0.95, clock=clock)
    assert not chosen.reached
    assert chosen.recall == pytest.approx(0.9)
    assert chosen.nprobes >= 40
    assert chosen.refine >= 2


def test_an_answer_as_good_as_the_last_exact_one_counts() -> None:
    exam = plain_exam()
    tied = Exam(queries=exam.queries, vids=exam.vids, scores=exam.scores, score_of=lambda found: np.full(found.shape, 0.1, np.float32))
    nearest, clock, _ = ladder_of(lambda *_: 5, cost=lambda *_: 0.001)
    assert tune(nearest, tied, target=0.99, clock=clock).recall == 1.0
    assert tune(nearest, exam, target=0.99, clock=clock).recall == 0.5
    with pytest.raises(InputError, match="nothing to tune with: 3 queries, 0 nprobes"):
        tune(nearest, exam, target=0.9, nprobes=())


def test_a_month_of_changes_leaves_few_fragments_and_every_row(disk: Place) -> None:
    spec = spec_of(compact_above=0.25, scalar=("brand",), text=("brand",), flat_below=1000)
    table = clustered(2000, spec)
    shop = {row[ID]: row for row in table.to_pylist()}
    version = refresh_indexes(disk.uri, spec, {}, at=fragmented(disk, table, spec, 4)).version
    draw, previous, compacted, most = np.random.default_rng(3), None, 0, 0.0
    for night in range(8):
        names = [str(name) for name in draw.permutation(sorted(shop))[:100]]
        changed = clustered(90, spec, seed=100 + night).to_pylist()
        fresh = [
            row | {ID: name, ID_HASH: shop[name][ID_HASH], VID: shop[name][VID]} for name, row in zip(names[:90], changed, strict=True)
        ]
        for name in names[90:]:
            del shop[name]
        shop |= {row[ID]: row for row in fresh}
        version = apply(
            disk.uri,
            upserts=[pa.Table.from_pylist(fresh, schema=spec.schema)],
            attrs=[],
            deletes=[pa.table({ID_HASH: id_hashes(pa.array(names[90:]))})],
            spec=spec,
            options={},
            expect_live=len(shop),
            at=version,
        )
        old, state = version, refresh_indexes(disk.uri, spec, {}, at=version)
        version = state.version
        assert set(state.unindexed.values()) == {0}
        compacted += state.compacted
        expected = pa.Table.from_pylist([*shop.values()], schema=spec.schema)
        size = sizes(disk.uri, version=version, options={})
        most = max(most, size["deleted_rows"] / (size["deleted_rows"] + size["rows"]))
        previous = pin(disk.uri, version=version, tag=f"g{night:06d}", previous=previous, store=disk.store, key=disk.key, options={})
        assert previous.rows_digest == rows_digest([expected])
        if state.compacted:
            assert size["fragments"] <= max(state.deltas.values()) + 1
            before = pa.concat_tables(read_rows(disk.uri, version=old, columns=[ID, VECTOR], options={}))
            after = pa.concat_tables(read_rows(disk.uri, version=version, columns=[ID, VECTOR], options={}))
            assert before.sort_by(ID).to_pylist() == after.sort_by(ID).to_pylist()
    assert compacted
    assert most <= 0.25
    some = expected.slice(0, 50)
    found = take(disk.uri, version=version, by=ID_HASH, values=some.column(ID_HASH).combine_chunks(), columns=spec.schema.names, options={})
    assert found.sort_by(ID).to_pylist() == some.sort_by(ID).to_pylist()
    searcher = TableSearcher(disk.uri, version, {})
    assert recall(disk, version, nprobes=50) == 1.0
    assert searcher.text("brand", 2000).num_rows == searcher.num_rows == len(shop)
    assert refresh_indexes(disk.uri, spec, {}, at=version).version == version


def test_many_small_fragments_become_one_and_a_sound_one_stays(disk: Place) -> None:
    spec = spec_of(scalar=(), text=(), vector_index="none")
    large, small = clustered(9000, spec), clustered(1300, spec, prefix="small")
    written = write_fragments(disk.uri, large, spec, {})
    for start in range(0, 1300, 10):
        written += write_fragments(disk.uri, small.slice(start, 10), spec, {})
    version = commit_build(disk.uri, written, spec, {})
    before = lance.dataset(disk.uri).get_fragments()[0].metadata
    state = refresh_indexes(disk.uri, spec, {}, at=version)
    after = [fragment.metadata for fragment in lance.dataset(disk.uri).get_fragments()]
    assert (state.compacted, len(after)) == (130, 2)
    assert [file.path for file in before.files] in [[file.path for file in fragment.files] for fragment in after]
    assert rows_digest([large, small]) == rows_digest(read_rows(disk.uri, version=state.version, columns=DIGESTED, options={}))


def test_a_compaction_beside_another_commit_is_refused(disk: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(scalar=(), text=(), vector_index="none")

    def beside(uri: str, *, options: Any, work: Any) -> Any:
        upserted(disk, clustered(1, spec, prefix="other"), spec, live=1301)
        return opening.committed(uri, options=options, work=work)

    version = fragmented(disk, clustered(1300, spec), spec, 130)
    monkeypatch.setattr(compacting, "committed", beside)
    with pytest.raises(AlreadyExists, match="another run writes it"):
        refresh_indexes(disk.uri, spec, {}, at=version)


def test_what_cannot_be_a_threshold_is_refused() -> None:
    for how in ({"distribute_above": -1}, {"compact_above": 0.0}, {"compact_above": 1.5}):
        with pytest.raises(InputError, match="distribute_above must be 0 or more"):
            spec_of(**how)


def test_a_big_table_of_another_kind_is_built_by_one_process(disk: Place) -> None:
    spec = spec_of(distribute_above=1000, vector_index="IVF_SQ", scalar=(), text=())
    refresh_indexes(disk.uri, spec, {}, at=fragmented(disk, clustered(2000, spec), spec, 4), workers=Workers(group_rows=1))
    assert (kind(disk), index_state(disk.uri, options={}).deltas[INDEX]) == ("IVF_SQ", 1)
    assert indexes.VECTOR_INDEX == INDEX


def test_codes_of_separate_workers_cannot_be_folded_but_whole_vectors_can(disk: Place) -> None:
    build(disk.uri, [clustered(1000, ONE), clustered(1000, ONE, prefix="other")], ONE, {})
    fragmented(disk, clustered(2000, ONE), ONE, 2)
    centres = pa.FixedSizeListArray.from_arrays(pa.array(questions(8).ravel()), DIMS)
    versions = {}
    for name in ("IVF_SQ", "IVF_FLAT"):
        dataset = lance.dataset(disk.uri)
        parts = [
            dataset.create_index_uncommitted(
                VECTOR, name, name=INDEX, metric="cosine", replace=True, fragment_ids=[number], num_partitions=8, ivf_centroids=centres
            )
            for number in (fragment.fragment_id for fragment in dataset.get_fragments())
        ]
        versions[name] = dataset.commit_existing_index_segments(INDEX, VECTOR, parts).version
        if name == "IVF_SQ":
            with pytest.raises(StoreError, match="do not share quantizer metadata"):
                fold_vector_index(disk.uri, {}, at=versions[name])
    assert fold_vector_index(disk.uri, {}, at=versions["IVF_FLAT"]).deltas[INDEX] == 1
