"""Recall under filters is measured in every band there is room for, the same way each time, and finds an index that is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from pipelines.filter_probes import BANDS, ENGINES, filters_of, recall_filtered
from pipelines.gates import GateLimits, Measured, judge
from pipelines.index.search import SegmentSearcher
from pipelines.schema import ID, VECTOR, VID
from pipelines.stores.lance import TableSearcher, build, refresh_indexes
from tests.pipelines.index_nights import Shop, unit
from tests.pipelines.lance_rows import DIMS, bulk, local, spec_of

ROWS = 30_000
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Both:
    """Both indexes of the same products."""

    segments: SegmentSearcher
    table: TableSearcher
    vectors: Floats


def opened(folder: Path, rows: int, *, wrong: bool = False) -> Both:
    """Build both indexes; where FAISS shall be wrong, it holds the products under each other's numbers."""
    place, spec = local(folder), spec_of()
    vectors = unit(np.random.default_rng(3), rows, DIMS)
    table = bulk(rows, spec)
    at = table.schema.get_field_index(VECTOR)
    table = table.set_column(at, table.schema.field(VECTOR), pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIMS))
    build(place.uri, [table], spec, place.options)
    version = refresh_indexes(place.uri, spec, place.options).version
    shop = Shop(folder)
    shop.next(dict(zip(table.column(ID).to_pylist(), vectors[::-1] if wrong else vectors, strict=True)), dims=DIMS)
    queries = vectors[np.argsort(table.column(VID).to_numpy())[:96]]
    return Both(SegmentSearcher.open(shop.store, shop.opened()), TableSearcher(place.uri, version, {}), queries)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return opened(tmp_path_factory.mktemp("both"), ROWS)


def test_every_band_has_filters_that_pass_its_share_of_the_products(both: Both) -> None:
    read: set[str] = set()
    for band in BANDS:
        filters = filters_of(both.table, band)
        assert len({where.key for where in filters}) == 3
        for where in filters:
            assert 0.8 * band.low < len(both.table.matching(where)) / ROWS < 1.25 * band.high
            assert len(both.table.matching(where)) >= 20
            read |= where.columns
    assert {"brand", VID} < read
    assert len(read) >= 4


def test_a_sound_generation_has_its_recall_measured_in_every_band_and_passes(both: Both) -> None:
    skipped: dict[str, str] = {}
    found = recall_filtered(both.segments, both.table, both.vectors, skipped)
    assert skipped == {}
    for engine in ENGINES:
        assert [item.band for item in found["recall_filtered"][engine]] == [band.name for band in BANDS]
        for item in found["recall_filtered"][engine]:
            assert 0.9 < item.recall <= 1.0
            assert item.recall >= 0.97 or item.queries > 18
            assert item.example
            assert item.rows >= 20
    again = recall_filtered(both.segments, replace(both).table, both.vectors, skipped)
    assert again == found


def test_an_index_that_holds_products_under_wrong_numbers_fails_its_own_gate_and_no_other(tmp_path: Path) -> None:
    broken = opened(tmp_path, 3_000, wrong=True)
    found = recall_filtered(broken.segments, broken.table, broken.vectors, {})
    assert {item.band for item in found["recall_filtered"]["faiss"]} == {"over 10 %", "1 to 10 %", "0.1 to 1 %"}
    assert all(item.recall < 0.8 for item in found["recall_filtered"]["faiss"])
    gates = {gate.name: gate for gate in judge(Measured(**found), GateLimits(), (), date(2026, 11, 4))}  # type: ignore[arg-type]
    assert gates["recall_filtered_faiss"].verdict == "failed"
    assert " of the products pass, recall 0." in gates["recall_filtered_faiss"].ids[0]
    assert gates["recall_filtered_lance"].verdict == "passed"


def test_a_table_of_few_products_has_no_bands_and_says_so(tmp_path: Path) -> None:
    small = opened(tmp_path, 45)
    skipped: dict[str, str] = {}
    assert recall_filtered(small.segments, small.table, small.vectors, skipped) == {}
    assert set(skipped) == {"recall_filtered_faiss", "recall_filtered_lance"}
    assert "a table of 45 products" in skipped["recall_filtered_faiss"]
    verdicts = {gate.name: gate.verdict for gate in judge(Measured(skipped=skipped), GateLimits(), (), date(2026, 11, 4))}
    assert verdicts["recall_filtered_faiss"] == verdicts["recall_filtered_lance"] == "skipped"


@pytest.mark.parametrize("rows", [0, 1, 45, 51, 300, 2_499, 2_501, 25_001, 100_000_000])
def test_a_band_aims_at_a_share_inside_itself_that_leaves_enough_to_find(rows: int) -> None:
    exist = [band for band in BANDS if (aim := band.aim(rows)) is not None and band.low < aim <= band.high and aim * rows >= 20]
    assert exist == [band for band in BANDS if band.aim(rows) is not None]
    assert len(exist) == sum(rows * band.high * 0.8 > 20 for band in BANDS)
