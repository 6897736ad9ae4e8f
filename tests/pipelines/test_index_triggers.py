"""Every reason to do more than add a delta: it decides, it is written down, and just short of it something else happens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import InputError, OldFormat
from pipelines.index.search import SegmentSearcher
from pipelines.index.segments import CARD, segments_of
from pipelines.index.spec import IndexSpec, Kind, Segment, Training
from pipelines.index.triggers import TRIGGERS, Change, Decision, Fit, RefreshOptions, candidates, decide, decide_fit
from pipelines.index.update import NextIndex
from pipelines.manifest import Manifest, ManifestObject
from tests.generations import sample_manifest
from tests.pipelines.index_nights import DIMS, PATIENT, Floats, Shop, named, unit, used

LISTS = replace(PATIENT, factory="IVF8,Flat")
# No two forks of a shop give their nights one name.
NIGHTS = itertools.count(50, 50)


def begun(root: Path, options: RefreshOptions = PATIENT, count: int = 100) -> Shop:
    shop = Shop(root, options)
    shop.next(named("p", unit(np.random.default_rng(0), count)))
    return shop


def fork(shop: Shop, options: RefreshOptions | None = None) -> Shop:
    """The same shop, for another night over the same base."""
    return replace(shop, options=options or shop.options, live=dict(shop.live), night=next(NIGHTS))


def happened(shop: Shop, found: NextIndex, *words: str) -> tuple[str, str | None]:
    """Return action and trigger as the manifest's bytes bring them back, with these words among the reasons."""
    use = used(shop)
    assert use == found.use
    assert use.trigger in (None, *TRIGGERS)
    for word in words:
        assert word in use.reason
    assert use.reason in found.reason
    assert (use.trigger or "") in found.reason
    # Whatever was done, what is live is found.
    searcher = SegmentSearcher.open(shop.store, shop.opened())
    assert searcher.num_live == len(shop.live)
    return use.action, use.trigger


def test_first_night_builds_and_the_next_ones_extend(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    assert happened(shop, shop.next(named("p", unit(np.random.default_rng(0), 20))), "no base segment yet") == ("rebuild", "first")
    again = fork(shop)
    # Another tower: what is there means nothing to it.
    assert happened(again, again.next(base=None), "no base segment yet") == ("rebuild", "first")
    assert happened(shop, shop.next(named("q", unit(np.random.default_rng(1), 2))), "2 entries are new and 0 are hidden") == ("delta", None)


def test_no_product_at_all_drops_the_index(tmp_path: Path) -> None:
    shop = begun(tmp_path)
    nearly = fork(shop)
    assert happened(nearly, nearly.next(delete=[*shop.live][1:])) == ("delta", None)
    found = shop.next(delete=[*shop.live])
    assert happened(shop, found, "no product is live") == ("rebuild", "empty")
    assert (found.segments, found.tombstones) == ((), ())


def test_index_of_an_older_format_is_built_anew(tmp_path: Path) -> None:
    shop = begun(tmp_path, LISTS, 400)
    now = fork(shop)
    assert happened(now, now.next()) == ("none", None)
    shop.manifest = aged(shop)
    with pytest.raises(OldFormat, match="format 1"):
        SegmentSearcher.open(shop.store, shop.opened())
    with pytest.raises(OldFormat):
        segments_of(shop.store, shop.opened())
    assert happened(shop, shop.next(named("q", unit(np.random.default_rng(1), 2))), "older format") == ("rebuild", "format")
    assert [segment.rows for segment in segments_of(shop.store, shop.opened())] == [402]


def test_index_of_an_older_format_and_no_products_is_dropped(tmp_path: Path) -> None:
    shop = begun(tmp_path)
    shop.manifest = aged(shop)
    assert happened(shop, shop.next(delete=[*shop.live]), "no product is live") == ("rebuild", "empty")


def aged(shop: Shop) -> Manifest:
    """The generation as an older release wrote it: manifest and card of format 1."""
    fields = json.loads(shop.opened().to_json())
    cards = [item for item in fields["segments"] if item["role"] == CARD]
    for item in cards:
        card = json.loads(shop.store.get(item["key"])) | {"format_version": 1, "nprobe": 8, "trained_sha256": None}
        del card["trained"], card["spread"]
        kept = ManifestObject.of(shop.store.put(item["key"], json.dumps(card).encode()), role=CARD)
        item.update(size=kept.size, sha256=kept.sha256)
    del fields["indexes"]
    return Manifest.from_json(json.dumps(fields | {"format_version": 1}).encode())


def test_manifest_of_format_1_says_nothing_of_its_indexes() -> None:
    fields = json.loads(sample_manifest().to_json())
    assert fields.pop("format_version") == 2
    assert fields.pop("indexes") == {}
    found = Manifest.from_json(json.dumps(fields | {"format_version": 1}).encode())
    assert found == sample_manifest()
    assert found.indexes == {}


def test_another_kind_of_index_in_the_settings_is_built(tmp_path: Path) -> None:
    shop = begun(tmp_path, LISTS, 400)
    same = fork(shop)
    assert happened(same, same.next()) == ("none", None)
    other = fork(shop, replace(LISTS, factory="IVF4,SQ8"))
    words = "the base is IVF8,Flat and the configuration asks for IVF4,SQ8"
    assert happened(other, other.next(), words) == ("rebuild", "settings")
    assert segments_of(other.store, other.opened())[0].spec.factory == "IVF4,SQ8"
    # Too few for the lists that are asked for: exact search, until there are enough.
    few = fork(shop)
    assert happened(few, few.next(delete=[*shop.live][:100]), "asks for Flat") == ("rebuild", "settings")
    assert happened(few, few.next(delete=[*few.live][:1])) == ("delta", None)


def test_another_number_of_dimensions_is_built(tmp_path: Path) -> None:
    shop = begun(tmp_path)
    wide = named("p", unit(np.random.default_rng(0), 100, 32))
    shop.live = wide
    words = "the base has 16 dimensions and the tower 32"
    assert happened(shop, shop.next(dims=32), words) == ("rebuild", "settings")


def test_catalog_that_outgrew_its_index_gets_another_kind(tmp_path: Path) -> None:
    """Exact search fits the memory for 700 products of 64 dimensions: at twice that the budget asks for codes."""
    rng, budget = np.random.default_rng(5), replace(PATIENT, memory_bytes=700 * (64 * 4 + 20))
    shop = Shop(tmp_path, budget)
    shop.next(named("p", unit(rng, 600, 64)), dims=64)
    assert segments_of(shop.store, shop.opened())[0].spec.factory == "Flat"
    near = fork(shop)
    assert happened(near, near.next(named("q", unit(rng, 300, 64)), dims=64)) == ("delta", None)
    grown = fork(shop)
    found = grown.next(named("q", unit(rng, 900, 64)), dims=64)
    assert happened(grown, found, "1500 products are live, and IVF", "suits them better than Flat") == ("rebuild", "size")
    assert segments_of(grown.store, grown.opened())[0].spec.nlist is not None


def test_budget_that_is_too_small_for_twice_the_products_stops_no_run(tmp_path: Path) -> None:
    rng, budget = np.random.default_rng(5), replace(PATIENT, memory_bytes=700 * (DIMS * 4 + 20))
    shop = Shop(tmp_path, budget)
    shop.next(named("p", unit(rng, 600)))
    found = shop.next(named("q", unit(rng, 300)))
    assert happened(shop, found, "300 entries are new") == ("delta", None)
    with pytest.raises(InputError, match=r"no index of 1,800 vectors .* Raise the budget"):
        shop.next(named("r", unit(rng, 900)))


def test_too_many_segments_are_folded_into_one_delta(tmp_path: Path) -> None:
    shop, rng = begun(tmp_path, replace(PATIENT, max_segments=3)), np.random.default_rng(1)
    for night in range(2):
        assert happened(shop, shop.next(named(f"n{night}-", unit(rng, 3)), delete=[f"p0000{night}"])) == ("delta", None)
    more = fork(shop, replace(PATIENT, max_segments=4))
    extra = named("z", unit(rng, 2))
    assert happened(more, more.next(extra)) == ("delta", None)
    assert len(segments_of(more.store, more.opened())) == 4
    found = shop.next(extra)
    assert happened(shop, found, "there would be 4 segments, more than 3") == ("fold", "segments")
    assert [(item.kind, item.rows) for item in segments_of(shop.store, shop.opened())] == [("base", 100), ("delta", 8)]
    assert found.num_hidden == 2  # in the base, which stays as it is


def test_deltas_that_hold_much_of_the_catalog_are_compacted(tmp_path: Path) -> None:
    shop, rng = begun(tmp_path, replace(PATIENT, delta_until=0.1)), np.random.default_rng(1)
    shop.next(named("q", unit(rng, 5)))
    limit = fork(shop)
    assert happened(limit, limit.next(named("r", unit(rng, 5)), delete=["p00001"])) == ("delta", None)
    beyond = named("r", unit(rng, 7))
    patient = fork(shop, PATIENT)
    assert happened(patient, patient.next(beyond)) == ("delta", None)
    found = shop.next(beyond)
    assert happened(shop, found, "delta segments would hold 12 of 112 live products, more than 10%") == ("compact", "deltas")
    assert (found.rows, found.tombstones) == ({f"run-{shop.night}-merged": 112}, ())


def test_entries_that_tombstones_hide_are_compacted_away(tmp_path: Path) -> None:
    shop = begun(tmp_path, replace(PATIENT, tombstones_until=0.1))
    shop.next(delete=[f"p0000{number}" for number in range(5)])
    limit = fork(shop)
    assert happened(limit, limit.next(delete=[f"p0001{number}" for number in range(5)])) == ("delta", None)
    patient, gone = fork(shop, PATIENT), [f"p0001{number}" for number in range(6)]
    assert happened(patient, patient.next(delete=gone)) == ("delta", None)
    found = shop.next(delete=gone)
    assert happened(shop, found, "tombstones would hide 11 of 100 entries, more than 10%") == ("compact", "tombstones")
    assert (found.rows, found.tombstones, found.num_hidden) == ({f"run-{shop.night}-merged": 89}, (), 0)


def crowd(shop: Shop, count: int, *, noise: float) -> dict[str, Floats]:
    """Products around one centroid of the base."""
    centroids = SegmentSearcher.open(shop.store, shop.opened()).centroids
    assert centroids is not None
    vectors = centroids[0] + noise * np.random.default_rng(8).standard_normal((count, DIMS))
    return named("crowd-", (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))


def strays(count: int) -> dict[str, Floats]:
    """Products without a group: far from every centroid, and with neighbours in several lists. First in the exam."""
    vectors = np.random.default_rng(9).standard_normal((count, DIMS))
    return named("a-stray-", (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))


def test_lists_that_became_unequal_are_trained_anew(tmp_path: Path) -> None:
    shop = begun(tmp_path, replace(LISTS, imbalance_until=1.5), 400)
    patient, extra = fork(shop, LISTS), crowd(shop, 200, noise=0.05)
    calm = patient.next(extra)
    assert happened(patient, calm) == ("delta", None)
    assert calm.fit is not None
    assert calm.fit.imbalance > 1.5 * calm.fit.trained_imbalance
    assert calm.fit.spread < calm.fit.trained_spread  # only one of the two
    found = shop.next(extra)
    words = f"lists are {calm.fit.imbalance:.2f} times as costly as even ones, {calm.fit.trained_imbalance:.2f} after training"
    assert happened(shop, found, words, "more than 1.5 times as much") == ("rebuild", "imbalance")
    assert found.fit is not None
    assert found.fit.imbalance == pytest.approx(found.fit.trained_imbalance, abs=1e-6)


def test_products_far_from_the_centroids_have_them_trained_anew(tmp_path: Path) -> None:
    shop = begun(tmp_path, replace(LISTS, drift_until=1.1), 400)
    patient, extra = fork(shop, LISTS), strays(200)
    calm = patient.next(extra)
    assert happened(patient, calm) == ("delta", None)
    assert calm.fit is not None
    assert calm.fit.spread > 1.1 * calm.fit.trained_spread
    found = shop.next(extra)
    words = f"entries are {calm.fit.spread:.4f} from their centroids, {calm.fit.trained_spread:.4f} after training"
    assert happened(shop, found, words, "more than 1.1 times as far") == ("rebuild", "drift")
    assert found.fit is not None
    assert found.fit.spread == found.fit.trained_spread


@pytest.mark.parametrize(("action", "limits"), [("compact", {"delta_until": 0.1}), ("fold", {"max_segments": 1})])
def test_lists_are_trained_anew_in_the_run_that_merged_segments(tmp_path: Path, action: str, limits: dict[str, Any]) -> None:
    shop, extra = begun(tmp_path, LISTS, 400), strays(200)
    merged = fork(shop, replace(LISTS, **limits))
    assert happened(merged, merged.next(extra))[0] == action
    both = fork(shop, replace(LISTS, drift_until=1.1, **limits))
    assert happened(both, both.next(extra), "from their centroids") == ("rebuild", "drift")
    assert [item.rows for item in segments_of(both.store, both.opened())] == [600]


def test_recall_that_fell_gets_more_probes_and_keeps_the_segments(tmp_path: Path) -> None:
    shop = begun(tmp_path, replace(LISTS, recall_at_10=0.6, probes_until=8), 400)
    before, extra = used(shop), strays(300)
    assert before.recall is not None
    assert before.recall > 0.9
    content = fork(shop, replace(shop.options, recall_at_10=0.1))
    assert happened(content, content.next(extra)) == ("delta", None)
    assert used(content).search == before.search
    found = shop.next(extra)
    words = (f"at {before.search['nprobe']} probes is below 0.6", f"{found.use.search['nprobe']} probes reach")
    assert happened(shop, found, *words, "300 entries are new and 0 are hidden") == ("delta", "recall")
    assert [item.rows for item in segments_of(shop.store, shop.opened())] == [400, 300]
    assert found.use.search["nprobe"] > before.search["nprobe"]
    # What training left is remembered: the limit does not creep upwards night by night.
    assert found.use.search["trained_nprobe"] == before.search["trained_nprobe"]
    assert found.use.target == 0.6
    assert found.use.recall is not None
    assert found.use.recall >= 0.6
    assert SegmentSearcher.open(shop.store, shop.opened()).how.nprobe == found.use.search["nprobe"]
    # The next night asks as this one found out.
    assert happened(shop, shop.next(named("q", unit(np.random.default_rng(1), 3)))) == ("delta", None)
    assert used(shop).search == found.use.search


def test_recall_that_no_allowed_search_reaches_has_the_lists_trained_anew(tmp_path: Path) -> None:
    shop = begun(tmp_path, replace(LISTS, recall_at_10=0.8, probes_until=1), 400)
    before = used(shop)
    found = shop.next(strays(300))
    words = "no search within 1 times the probes after training reaches a recall of 0.8"
    assert happened(shop, found, words, "300 entries are new") == ("rebuild", "recall")
    assert [item.rows for item in segments_of(shop.store, shop.opened())] == [700]
    assert found.use.recall is not None
    assert found.use.recall >= 0.8
    assert found.use.search["trained_nprobe"] == found.use.search["nprobe"] > before.search["nprobe"] + 1


def test_a_target_that_was_raised_is_tuned_for(tmp_path: Path) -> None:
    shop = Shop(tmp_path, replace(LISTS, recall_at_10=0.4))
    shop.next(strays(400))
    before, extra = used(shop), named("q", unit(np.random.default_rng(1), 3))
    assert before.recall is not None
    assert before.recall < 0.9
    probes = fork(shop, replace(shop.options, recall_at_10=0.9, probes_until=8))
    found = probes.next(extra)
    assert happened(probes, found, "is below 0.9") == ("delta", "recall")
    assert found.use.search["nprobe"] > before.search["nprobe"]
    lists = fork(shop, replace(shop.options, recall_at_10=0.9, probes_until=1))
    assert happened(lists, lists.next(extra), "reaches a recall of 0.9") == ("rebuild", "recall")
    assert lists.next().action == "none"


def test_recall_that_nothing_reaches_is_left_to_the_gates(tmp_path: Path) -> None:
    shop = begun(tmp_path, replace(LISTS, factory="IVF8,RaBitQfs", recall_at_10=1.0), 400)
    first = used(shop)
    assert first.target == 1.0
    assert first.recall is not None
    assert 0.3 < first.recall < 1.0
    # It is not trained anew every night for that, but when it falls below what training reached.
    assert happened(shop, shop.next(named("q", unit(np.random.default_rng(1), 3)))) == ("delta", None)
    found = shop.next(strays(300))
    assert happened(shop, found, "reaches a recall of 1") == ("rebuild", "recall")
    assert found.use.recall is not None
    assert 0.3 < found.use.recall < 1.0


def tried(root: Path, monkeypatch: pytest.MonkeyPatch, *factories: str) -> tuple[str, NextIndex]:
    """Build where these kinds are to be tried in turn and everything must be found."""
    specs = [IndexSpec(factory=factory, dims=DIMS) for factory in factories]
    monkeypatch.setattr("pipelines.index.update.candidates", lambda *_: specs)
    shop = Shop(root, replace(PATIENT, recall_at_10=1.0))
    found = shop.next(named("p", unit(np.random.default_rng(0), 400)))
    happened(shop, found)
    return segments_of(shop.store, shop.opened())[0].spec.factory, found


def test_the_next_kind_is_tried_where_the_first_finds_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory, found = tried(tmp_path / "a", monkeypatch, "IVF8,RaBitQfs", "IVF8,Flat", "IVF4,SQ8")
    assert (factory, found.use.recall) == ("IVF8,Flat", 1.0)
    # None is enough: the one that found most.
    factory, found = tried(tmp_path / "b", monkeypatch, "IVF8,RaBitQ4fs", "IVF8,RaBitQfs")
    assert factory == "IVF8,RaBitQ4fs"


def test_exact_search_ends_the_search_for_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(tmp_path, monkeypatch, "IVF8,RaBitQfs", "Flat")[0] == "Flat"


def test_every_trigger_has_a_test_of_its_own() -> None:
    source = Path(__file__).read_text()
    assert [trigger for trigger in TRIGGERS if f', "{trigger}")' not in source] == []


def segment(rows: int, *, kind: Kind = "base", factory: str = "Flat", dims: int = 8) -> Segment:
    trained = None if factory == "Flat" else Training(sha256="ab" * 32, rows=rows, spread=0.1, imbalance=1.0)
    spec = IndexSpec(factory=factory, dims=dims)
    template = None if kind == "base" else "base"
    return Segment(name=kind, kind=kind, rows=rows, spec=spec, trained=trained, template=template, spread=0.1, objects=())


def decided(segments: list[Segment], *, options: RefreshOptions = PATIENT, dims: int = 8, **counts: int) -> tuple[str, str | None]:
    change = Change(**({"num_added": 0, "num_gone": 0, "num_hidden": 0} | counts))
    decision = decide(segments, change, options=options, dims=dims)
    assert decision.reason
    return decision.action, decision.trigger


def test_night_without_changes_does_nothing_whatever_the_limits() -> None:
    worn = [segment(100), segment(90, kind="delta")]
    strict = RefreshOptions(delta_until=0, tombstones_until=0, max_segments=1)
    assert decided(worn, options=strict, num_hidden=50, num_live=140) == ("none", None)
    assert decided([], num_live=0) == ("none", "empty")


def test_a_limit_is_passed_only_beyond_it() -> None:
    grown, options = [segment(92), segment(5, kind="delta")], replace(PATIENT, delta_until=0.1)
    assert decided(grown, options=options, num_added=5, num_gone=2, num_live=100) == ("delta", None)
    assert decided(grown, options=options, num_added=6, num_gone=3, num_live=100) == ("compact", "deltas")
    options = replace(PATIENT, tombstones_until=0.1)
    assert decided([segment(100)], options=options, num_hidden=5, num_gone=5, num_live=90) == ("delta", None)
    assert decided([segment(100)], options=options, num_hidden=5, num_gone=6, num_live=89) == ("compact", "tombstones")
    options, two = replace(PATIENT, max_segments=3), [segment(1000), segment(1, kind="delta")]
    assert decided(two, options=options, num_added=1, num_live=1002) == ("delta", None)
    assert decided([*two, segment(1, kind="delta")], options=options, num_added=1, num_live=1003) == ("fold", "segments")
    assert decided([*two, segment(1, kind="delta")], options=options, num_gone=1, num_live=1001) == ("delta", None)


def test_fit_is_judged_by_multiples_of_what_training_left() -> None:
    options = RefreshOptions(imbalance_until=2, drift_until=1.25)
    fit = Fit(imbalance=3.0, trained_imbalance=1.5, spread=0.25, trained_spread=0.2)
    assert decide_fit(fit, options) is None
    for change, trigger in (({"imbalance": 3.01}, "imbalance"), ({"spread": 0.2515}, "drift")):
        decision = decide_fit(replace(fit, **change), options)
        assert isinstance(decision, Decision)
        assert (decision.action, decision.trigger) == ("rebuild", trigger)


def impossible() -> Iterator[dict[str, Any]]:
    for name in ("delta_until", "tombstones_until", "recall_at_10"):
        yield from ({name: value} for value in (-0.1, 1.1, float("nan")))
    for name in ("imbalance_until", "drift_until", "probes_until"):
        yield from ({name: value} for value in (0.9, float("nan")))
    yield from ({"max_segments": 0}, {"memory_bytes": 0}, {"latency_ms": -1.0}, {"factory": "HNSW32"}, {"factory": ""})


@pytest.mark.parametrize("options", impossible(), ids=str)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RefreshOptions(**options)


@pytest.mark.parametrize("factory", ["IVF1024,PQ96x4fs", "IVF16384_HNSW32,PQ192x4fs,Refine(SQ8)", "IVF64,RaBitQ4fs", "Flat"])
def test_factories_are_checked_without_knowing_the_dimensions(factory: str) -> None:
    assert RefreshOptions(factory=factory).factory == factory


def test_product_codes_that_do_not_divide_the_dimensions_are_refused_before_anything_is_built() -> None:
    with pytest.raises(InputError, match="cannot be cut into 100 equal parts"):
        candidates(10_000, 384, RefreshOptions(factory="IVF64,PQ100x4fs"))
    with pytest.raises(InputError, match="Raise the budget"):
        candidates(100_000, 384, RefreshOptions(memory_bytes=1_000_000))
