"""Which index a catalog gets, and when it is extended or rebuilt."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.errors import InputError
from pipelines.index.spec import Change, IndexSpec, Kind, RefreshOptions, Segment, choose, decide

OPTIONS = RefreshOptions()


def segment(rows: int, *, kind: Kind = "base", factory: str = "Flat", dims: int = 8) -> Segment:
    spec = IndexSpec(factory=factory, nprobe=None if factory == "Flat" else 8, dims=dims)
    trained = None if factory == "Flat" else "ab" * 32
    return Segment(
        name=kind, kind=kind, rows=rows, spec=spec, trained_sha256=trained, template=None if kind == "base" else "base", objects=()
    )


def action(segments: list[Segment], *, options: RefreshOptions = OPTIONS, dims: int = 8, **counts: int) -> tuple[str, str]:
    change = Change(**({"num_added": 0, "num_gone": 0, "num_hidden": 0} | counts))
    decision = decide(segments, change, options=options, dims=dims)
    return decision.action, decision.reason


@pytest.mark.parametrize(
    ("rows", "factory"), [(0, "Flat"), (19_999, "Flat"), (20_000, "IVF128,SQ8"), (10**5, "IVF256,SQ8"), (10**6, "IVF1024,SQ8")]
)
def test_small_catalogs_are_exact_and_large_ones_have_lists(rows: int, factory: str) -> None:
    assert choose(rows, 384).factory == factory


def test_every_chosen_index_can_be_trained_and_probes_its_lists() -> None:
    for rows in [*range(0, 60_000, 977), 10**6, 10**7, 10**8]:
        spec = choose(rows, 64, flat_below=0)
        assert (spec.nlist or 0) * 39 <= rows
        assert (spec.nprobe is None) == (spec.nlist is None)


def test_override_is_used_where_it_can_be_trained() -> None:
    assert choose(39 * 64, 8, override="IVF64,Flat").factory == "IVF64,Flat"
    assert choose(39 * 64 - 1, 8, override="IVF64,Flat").factory == "Flat"
    assert choose(10**6, 8, override="Flat").factory == "Flat"


@pytest.mark.parametrize("factory", ["", "HNSW32", "IVF0,Flat", "IVF-1,SQ8", "IVF64,PQ8", "flat", "IVF64,SQ8 ", "OPQ8,IVF64,SQ8"])
def test_unknown_factory_is_refused(factory: str) -> None:
    with pytest.raises(InputError, match="is not one of"):
        RefreshOptions(factory=factory)


@pytest.mark.parametrize("nprobe", [0, 65, None])
def test_impossible_probes_are_refused(nprobe: int | None) -> None:
    with pytest.raises(InputError):
        IndexSpec(factory="IVF64,SQ8", nprobe=nprobe, dims=8)


@pytest.mark.parametrize(
    "options",
    [
        {"delta_until": 1.1},
        {"tombstones_until": -0.1},
        {"recall_at_10": 2},
        {"flat_below": -1},
        {"max_segments": 0},
        {"delta_until": float("nan")},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RefreshOptions(**options)


def test_first_night_builds_a_base() -> None:
    assert action([], num_added=5, num_live=5)[0] == "rebuild"


def test_night_without_changes_does_nothing() -> None:
    assert action([segment(100)], num_live=100)[0] == "none"


def test_empty_catalog_needs_nothing_and_shrinking_to_it_drops_the_index() -> None:
    assert action([], num_live=0)[0] == "none"
    assert action([segment(5)], num_gone=5, num_live=0)[0] == "rebuild"


def test_delta_until_the_share_of_new_entries_is_passed() -> None:
    grown = [segment(92), segment(5, kind="delta")]
    assert action(grown, num_added=5, num_gone=2, num_live=100)[0] == "delta"
    refused, reason = action(grown, num_added=6, num_gone=3, num_live=100)
    assert (refused, "11 of 100 live products, more than 10%" in reason) == ("rebuild", True)


def test_tombstones_until_their_share_is_passed() -> None:
    assert action([segment(100)], num_hidden=5, num_gone=5, num_live=90)[0] == "delta"
    refused, reason = action([segment(100)], num_hidden=5, num_gone=6, num_live=89)
    assert (refused, "11 of 100 entries, more than 10%" in reason) == ("rebuild", True)


def test_segments_until_their_number_is_passed() -> None:
    options = RefreshOptions(max_segments=3)
    two = [segment(1000), segment(1, kind="delta")]
    assert action(two, options=options, num_added=1, num_live=1002)[0] == "delta"
    assert action([*two, segment(1, kind="delta")], options=options, num_added=1, num_live=1003)[0] == "rebuild"
    assert action([*two, segment(1, kind="delta")], options=options, num_gone=1, num_live=1001)[0] == "delta"


def test_type_of_the_base_follows_the_size_with_room_between() -> None:
    patient = RefreshOptions(delta_until=1, tombstones_until=1)
    ivf = segment(30_000, factory="IVF128,SQ8")
    assert action([segment(39_998)], options=patient, num_added=1, num_live=39_999)[0] == "delta"
    assert action([segment(39_998)], options=patient, num_added=2, num_live=40_000)[0] == "rebuild"
    assert action([ivf], options=patient, num_gone=20_000, num_live=10_000)[0] == "delta"
    assert action([ivf], options=patient, num_gone=20_001, num_live=9_999)[0] == "rebuild"


def test_changed_configuration_or_tower_rebuilds() -> None:
    asked = RefreshOptions(factory="IVF8,Flat")
    assert action([segment(1000)], options=asked, num_live=1000)[0] == "rebuild"
    assert action([segment(1000, factory="IVF8,Flat")], options=asked, num_live=1000)[0] == "none"
    assert action([segment(100)], options=asked, num_live=100)[0] == "none"  # too few to train: Flat is what it gets
    assert action([segment(100)], dims=16, num_live=100)[0] == "rebuild"
