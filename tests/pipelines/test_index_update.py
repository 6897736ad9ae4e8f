"""Nights of an index: deltas and tombstones, rebuilds, and runs that are repeated."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.disk import NO_FAULTS, Faults
from pipelines.errors import CorruptObject, ManifestError, PlanError
from pipelines.index.build import Rows, build_delta
from pipelines.index.search import SegmentSearcher
from pipelines.index.segments import FAISS, IDS, TRAINED, read_roster, read_tombstones, segments_of, write_tombstones
from pipelines.index.triggers import RefreshOptions
from pipelines.index.update import NextIndex
from tests.faults import Recorder, Strike, Vanished
from tests.pipelines.index_nights import PATIENT, Shop, named, numbers, of, rows, unit, vid_of


def filled(path: Path, count: int = 100, options: RefreshOptions = PATIENT) -> Shop:
    shop = Shop(path, options)
    shop.next(named("p", unit(np.random.default_rng(0), count)))
    return shop


def files(root: Path) -> dict[str, str]:
    store = root / "store"
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in store.rglob("*") if path.is_file()}


def hidden(shop: Shop) -> dict[str, set[str]]:
    """Ids of the entries that tombstones hide, by segment."""
    segments = {segment.name: segment for segment in segments_of(shop.store, shop.opened())}
    dead = read_tombstones(shop.store, shop.opened())
    return {name: set(read_roster(shop.store, segments[name]).ids.filter(pa.array(mask)).to_pylist()) for name, mask in dead.items()}


def test_delta_adds_one_segment_and_hides_only_what_older_ones_hold(tmp_path: Path) -> None:
    shop, rng = filled(tmp_path), np.random.default_rng(1)
    before = shop.opened()
    found = shop.next(named("q", unit(rng, 4)), {"p00003": unit(rng, 1)[0]}, ["p00007"])
    assert (found.action, found.rows, found.num_hidden) == ("delta", {"run-1-base": 100, "run-2-delta": 5}, 2)
    assert found.segments[: len(before.segments)] == before.segments
    assert hidden(shop) == {"run-1-base": {"p00003", "p00007"}}
    assert [item.key for item in found.tombstones] == ["generations/g000002/tombstones-run-1-base.parquet"]
    # Changed again, and one that is new goes: now both segments hide something, and the base keeps what it hid.
    found = shop.next({}, {"p00003": unit(rng, 1)[0]}, ["q00000", "p00008"])
    assert hidden(shop) == {"run-1-base": {"p00003", "p00007", "p00008"}, "run-2-delta": {"p00003", "q00000"}}
    assert found.num_hidden == 5


def test_deleted_product_that_returns_is_found_with_its_new_vector(tmp_path: Path) -> None:
    shop, rng = filled(tmp_path), np.random.default_rng(2)
    shop.next(delete=["p00005"])
    fresh = unit(rng, 1)
    shop.next({"p00005": fresh[0]})
    hits = SegmentSearcher.open(shop.store, shop.opened()).search(fresh, 1)
    assert hits.ids == [["p00005"]]
    np.testing.assert_allclose(hits.scores, 1, atol=1e-6)


def test_numbers_of_products_never_change(tmp_path: Path) -> None:
    shop, rng = filled(tmp_path), np.random.default_rng(2)
    before = SegmentSearcher.open(shop.store, shop.opened())
    shop.next(named("q", unit(rng, 9)), {"p00001": unit(rng, 1)[0]}, ["p00000"])
    rebuilt = Shop(tmp_path / "other")
    rebuilt.next(shop.live)
    searchers = [before, SegmentSearcher.open(shop.store, shop.opened()), SegmentSearcher.open(rebuilt.store, rebuilt.opened())]
    assert [searcher.ids_of(numbers(["p00001", "p00099"])) for searcher in searchers] == [["p00001", "p00099"]] * 3
    assert searchers[1].all_live_vids().tolist() == searchers[2].all_live_vids().tolist()


def test_nights_write_new_files_and_rewrite_none(tmp_path: Path) -> None:
    shop, rng = filled(tmp_path), np.random.default_rng(3)
    for night in range(4):
        before = files(tmp_path)
        shop.next(named(f"n{night}-", unit(rng, 3)), {"p00001": unit(rng, 1)[0]}, [f"p0001{night}"])
        after = files(tmp_path)
        assert before.items() <= after.items()
        assert {item.key for item in shop.opened().objects} <= after.keys()


def test_night_of_attributes_alone_shares_every_segment(tmp_path: Path) -> None:
    shop = filled(tmp_path)
    shop.next(delete=["p00004"])
    before, written = shop.opened(), files(tmp_path)
    found = shop.next()
    assert (found.action, found.segments) == ("none", before.segments)
    assert [item.sha256 for item in found.tombstones] == [item.sha256 for item in before.tombstones]
    assert files(tmp_path).keys() - written.keys() == {"generations/g000003/tombstones-run-1-base.parquet"}


def test_past_a_limit_one_base_of_the_live_products_remains(tmp_path: Path) -> None:
    shop, rng = filled(tmp_path, options=replace(PATIENT, delta_until=0.1)), np.random.default_rng(4)
    assert shop.next(named("q", unit(rng, 5)), delete=["p00001"]).action == "delta"
    found = shop.next(named("r", unit(rng, 20)), delete=["p00002"])
    assert (found.action, found.rows, found.tombstones) == ("compact", {"run-3-merged": 123}, ())
    assert "more than 10%" in found.reason


@pytest.mark.parametrize("factory", ["Flat", "IVF2,RaBitQfs,Refine(SQ8)"])
def test_months_of_nights_end_as_one_delta_of_the_first_template(tmp_path: Path, factory: str) -> None:
    """Deltas, folds and compactions in any number: the lists are those of the live rows, filled once."""
    options = replace(PATIENT, factory=factory, max_segments=4, delta_until=0.4)
    shop, rng = filled(tmp_path, 150, options), np.random.default_rng(4)
    first, actions = segments_of(shop.store, shop.opened())[0], []
    for night in range(14):
        gone = rng.permutation(np.array([*shop.live]))[:6].tolist()
        changed = {name: unit(rng, 1)[0] for name in rng.permutation(np.array([*shop.live]))[:4].tolist() if name not in gone}
        actions.append(shop.next(named(f"n{night}-", unit(rng, 6)), changed, gone).action)
    assert {*actions} == {"delta", "fold", "compact"}
    shop.options = replace(options, delta_until=0)
    assert shop.next(named("z", unit(rng, 1))).action == "compact"
    whole = build_delta(shop.store, "whole", of(shop.live), first, work=tmp_path)
    files = {item.role: item.sha256 for item in shop.opened().segments}
    assert [files[role] for role in (FAISS, IDS)] == [whole.object(role).sha256 for role in (FAISS, IDS)]
    if first.trained:
        assert files[TRAINED] == first.object(TRAINED).sha256


def test_catalog_that_shrinks_to_nothing_and_returns(tmp_path: Path) -> None:
    shop = filled(tmp_path)
    found = shop.next(delete=[*shop.live])
    assert (found.action, found.segments, found.tombstones) == ("rebuild", (), ())
    assert SegmentSearcher.open(shop.store, shop.opened()).num_live == 0
    assert shop.next(named("p", unit(np.random.default_rng(5), 7))).rows == {"run-3-base": 7}


def test_full_build_and_nights_hold_the_same_products(tmp_path: Path) -> None:
    shop, rng = filled(tmp_path / "nights", options=RefreshOptions()), np.random.default_rng(6)
    for night in range(4):
        shop.next(named(f"n{night}-", unit(rng, 2)), {f"p0002{night}": unit(rng, 1)[0]}, [f"p0001{night}"])
    whole = Shop(tmp_path / "whole", options=RefreshOptions())
    whole.next(shop.live)
    queries = unit(rng, 8)
    one, many = (SegmentSearcher.open(each.store, each.opened()).search(queries, 20) for each in (whole, shop))
    assert one.ids == many.ids
    np.testing.assert_allclose(one.scores, many.scores, atol=2e-6)


@pytest.mark.parametrize(
    ("action", "options", "step"),
    [
        ("delta", PATIENT, 1),
        # They reach the same points more often: some of them, others in each case.
        ("fold", replace(PATIENT, max_segments=1), 9),
        ("compact", replace(PATIENT, factory="IVF2,SQ8", delta_until=0), 7),
        ("rebuild", replace(PATIENT, factory="IVF2,SQ8", delta_until=0, drift_until=1), 11),
    ],
)
def test_run_that_dies_anywhere_converges_when_it_is_repeated(tmp_path: Path, action: str, options: RefreshOptions, step: int) -> None:
    shop, rng = filled(tmp_path, 90, replace(PATIENT, factory=options.factory)), np.random.default_rng(7)
    shop.next(delete=["p00009"])
    fresh, changed = named("q", unit(rng, 3)), {"p00001": unit(rng, 1)[0]}
    base, live = shop.opened(), dict(shop.live)

    def run(root: Path, faults: Faults = NO_FAULTS) -> NextIndex:
        again = Shop(root, options, live=dict(live), manifest=base, night=2, faults=faults)
        return again.next(fresh, changed, ["p00002"])

    recorder = Recorder()
    shutil.copytree(tmp_path / "store", tmp_path / "calm" / "store")
    want = run(tmp_path / "calm", recorder)
    assert want.action == action
    content = files(tmp_path / "calm")
    assert len(recorder.points) > 30
    for number in range(step - 1, len(recorder.points), step):
        root = tmp_path / f"torn-{number}"
        shutil.copytree(tmp_path / "store", root / "store")
        with pytest.raises(Vanished):
            run(root, Strike(number, "vanish"))
        assert run(root) == want
        assert {name: sha for name, sha in files(root).items() if ".tmp-" not in name} == content


def test_repeated_run_with_other_content_is_refused(tmp_path: Path) -> None:
    shop = filled(tmp_path, 20)
    with pytest.raises(PlanError, match="new id"):
        Shop(tmp_path).next(named("p", unit(np.random.default_rng(99), 20)))
    assert SegmentSearcher.open(shop.store, shop.opened()).num_live == 20


def test_added_product_that_is_live_already_is_refused(tmp_path: Path) -> None:
    shop = filled(tmp_path, 20)
    with pytest.raises(PlanError, match="'p00003' is added where it is live already"):
        shop.next({"p00003": unit(np.random.default_rng(1), 1)[0]})


def test_number_that_belongs_to_another_product_is_refused(tmp_path: Path) -> None:
    shop, rng = filled(tmp_path, 20), np.random.default_rng(1)
    fresh = named("q", unit(rng, 1))

    def colliding() -> object:
        for table in rows(fresh)():
            yield table.set_column(1, "vid", [[vid_of("p00003")]])

    for touched in ([], ["p00003"]):
        with pytest.raises(PlanError, match="'p00003' and 'q00000' share the number"):
            shop.next(fresh, added=colliding, touched=numbers(touched))


def test_counts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    shop = filled(tmp_path, 20)
    with pytest.raises(PlanError, match="20 live entries where 19 products are live"):
        shop.next(live=Rows(pieces=[rows(shop.live)], count=19))
    first = named("p", unit(np.random.default_rng(1), 5))
    with pytest.raises(PlanError, match="5 live entries where 6 products are live"):
        Shop(tmp_path / "first").next(first, live=Rows(pieces=[rows(first)], count=6))


def test_tombstones_for_nothing_are_refused(tmp_path: Path) -> None:
    shop = filled(tmp_path, 20)
    shop.next(delete=["p00001"])
    manifest = shop.opened()
    with pytest.raises(ManifestError, match="tombstones for run-1-base, which it does not have"):
        SegmentSearcher.open(shop.store, replace(manifest, segments=()))
    item = write_tombstones(shop.store, "g000009", "run-1-base", np.array([True, True]), work=tmp_path)
    with pytest.raises(ManifestError, match="2 tombstones for 20 entries"):
        SegmentSearcher.open(shop.store, replace(manifest, tombstones=(item,)))
    with pytest.raises(CorruptObject, match="expected 3 hidden entries"):
        read_tombstones(shop.store, replace(manifest, tombstones=(replace(item, rows=3),)))


def test_product_that_is_live_twice_is_refused(tmp_path: Path) -> None:
    shop = filled(tmp_path, 20)
    shop.next(change={"p00001": unit(np.random.default_rng(1), 1)[0]})
    with pytest.raises(ManifestError, match="live in two segments"):
        SegmentSearcher.open(shop.store, replace(shop.opened(), tombstones=()))


def test_index_without_its_base_is_refused(tmp_path: Path) -> None:
    shop = filled(tmp_path, 20)
    shop.next(named("q", unit(np.random.default_rng(1), 2)))
    delta = tuple(item for item in shop.opened().segments if "delta" in item.key)
    with pytest.raises(ManifestError, match="0 base segments"):
        segments_of(shop.store, replace(shop.opened(), segments=delta))
    assert [segment.kind for segment in segments_of(shop.store, shop.opened())] == ["base", "delta"]
