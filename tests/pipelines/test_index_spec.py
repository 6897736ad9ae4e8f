"""What an index may be called, what follows from its name, and which cards make no sense."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CorruptObject, InputError, ManifestError, OldFormat
from pipelines.index.build import build_base, build_delta
from pipelines.index.search import SegmentSearcher
from pipelines.index.segments import CARD, card_bytes, segments_of
from pipelines.index.spec import IndexSpec, Search, Segment, Training
from pipelines.manifest import Manifest, ManifestObject
from pipelines.storage import Store
from tests.generations import sample_manifest
from tests.pipelines.index_nights import DIMS, FACTORIES, named, of, unit

TRAINING = Training(sha256="ab" * 32, rows=100, spread=0.1, imbalance=1.0)
BASE = Segment(
    name="b", kind="base", rows=9, spec=IndexSpec(factory="IVF4,SQ8", dims=8), template=None, trained=TRAINING, spread=0.1, objects=()
)


@pytest.mark.parametrize(
    ("factory", "lists", "codes", "fast", "template"),
    [
        ("Flat", (None, None), ("Flat", None, None), False, "Flat"),
        ("IVF64,Flat", (64, None), ("Flat", None, None), False, "IVF64,Flat"),
        ("IVF64,SQ8", (64, None), ("SQ8", None, None), False, "IVF64,SQ8"),
        ("IVF64,SQfp16,Refine(SQ8)", (64, None), ("SQfp16", None, "SQ8"), False, "IVF64,SQfp16"),
        ("IVF4096_HNSW32,PQ48x4fs,Refine(SQfp16)", (4096, 32), ("PQ48x4", 48, "SQfp16"), True, "IVF4096_HNSW32,PQ48x4"),
        ("IVF64,RaBitQfs", (64, None), ("RaBitQ", None, None), True, "IVF64,RaBitQ"),
        ("IVF64,RaBitQ4fs,Refine(SQ8)", (64, None), ("RaBitQ4", None, "SQ8"), True, "IVF64,RaBitQ4"),
    ],
)
def test_a_name_says_how_vectors_are_kept(
    factory: str, lists: tuple[int | None, int | None], codes: tuple[str, int | None, str | None], fast: bool, template: str
) -> None:
    spec = IndexSpec(factory=factory, dims=384)
    assert ((spec.nlist, spec.graph), (spec.codes, spec.parts, spec.refine), spec.fast, spec.template) == (lists, codes, fast, template)


UNKNOWN = (
    "|HNSW32|flat|OPQ8,IVF64,SQ8|IVF64|IVF0,Flat|IVF-1,SQ8|IVF99999999,SQ8|IVF64,SQ8 |IVF64,SQ8\n|IVF64,PQ8|IVF64,PQ48x4|IVF64,PQ48x8fs"
    "|IVF64,RaBitQ|IVF64,RaBitQ1fs|IVF64,RaBitQ9fs|IVF64,SQ8,Refine(Flat)|Flat,Refine(SQ8)|IVF64_HNSW,SQ8|IVF64_HNSW0,SQ8"
)


@pytest.mark.parametrize("factory", UNKNOWN.split("|"))
def test_unknown_name_is_refused_with_what_is_known(factory: str) -> None:
    with pytest.raises(InputError, match=r"none that is known. Write Flat, or IVF<lists>"):
        IndexSpec(factory=factory, dims=384)


def test_dimensions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="0 dimensions"):
        IndexSpec(factory="Flat", dims=0)
    with pytest.raises(InputError, match="384 dimensions cannot be cut into 50 equal parts"):
        IndexSpec(factory="IVF64,PQ50x4fs", dims=384)
    # From 16 numbers a part on, FAISS encodes in batches, and a code would depend on its neighbours.
    with pytest.raises(InputError, match="16 numbers is too coarse"):
        IndexSpec(factory="IVF64,PQ24x4fs", dims=384)
    assert IndexSpec(factory="IVF64,PQ32x4fs", dims=384).parts == 32


def test_bytes_of_an_entry_are_those_of_codes_finer_codes_and_position() -> None:
    def entry(factory: str) -> int:
        return IndexSpec(factory=factory, dims=384).entry_bytes

    assert entry("Flat") == 1536
    assert entry("IVF64,Flat") == 1536 + 8
    assert entry("IVF64,PQ48x4fs") == 24 + 8
    assert entry("IVF64,PQ48x4fs,Refine(SQfp16)") == 24 + 768 + 8
    assert entry("IVF64,RaBitQfs") == 48 + 8 + 8
    assert entry("IVF64,RaBitQ4fs,Refine(SQ8)") == 48 + 8 + 144 + 12 + 384 + 8


def test_every_kind_that_is_tested_is_known() -> None:
    assert [IndexSpec(factory=factory, dims=DIMS).factory for factory in FACTORIES] == [*FACTORIES]


@pytest.mark.parametrize("asked", [{"nprobe": 0}, {"refine": 0}, {"nprobe": -1}])
def test_impossible_searches_are_refused(asked: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least one list"):
        Search(**asked)


def test_segments_whose_parts_contradict_each_other_are_refused() -> None:
    assert replace(BASE, kind="delta", template="b").template == "b"
    with pytest.raises(ManifestError, match="A delta has one, a base has none"):
        replace(BASE, kind="delta")
    with pytest.raises(ManifestError, match="A delta has one, a base has none"):
        replace(BASE, template="b")
    with pytest.raises(ManifestError, match="damaged"):
        replace(BASE, trained=None)
    with pytest.raises(ManifestError, match="damaged"):
        replace(BASE, spec=IndexSpec(factory="Flat", dims=8))
    with pytest.raises(ManifestError, match="segment b has no `faiss` object"):
        BASE.object("faiss")


def stored(store: Store, work: Path, *, name: str = "run-base", seed: int = 0) -> Segment:
    products = named("p", unit(np.random.default_rng(seed), 300))
    return build_base(store, name, of(products), IndexSpec(factory="IVF4,SQ8", dims=DIMS), work=work)


def manifest(*segments: Segment) -> Manifest:
    return sample_manifest(segments=tuple(item for segment in segments for item in segment.objects))


def carded(store: Store, segment: Segment, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Segment:
    """Give a segment another card, listed as if it had been written so."""
    fields = json.loads(card_bytes(segment))
    change(fields)
    card = ManifestObject.of(store.put(segment.object(CARD).key, json.dumps(fields).encode()), role=CARD)
    return replace(segment, objects=tuple(card if item.role == CARD else item for item in segment.objects))


def test_card_of_an_older_format_asks_for_a_new_index(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    old = carded(store, stored(store, tmp_path), lambda fields: fields.update(format_version=1, nprobe=8))
    with pytest.raises(OldFormat, match=r"format 1 is of an older .* The next run makes it anew"):
        segments_of(store, manifest(old))
    new = carded(store, old, lambda fields: fields.update(format_version=3))
    with pytest.raises(ManifestError, match="upgrade"):
        segments_of(store, manifest(new))


@pytest.mark.parametrize(
    ("field", "value"),
    [("factory", "HNSW32"), ("metric", "l2"), ("name", "other"), ("kind", "delta"), ("rows", 299), ("trained", None), ("dims", 0)],
)
def test_damaged_card_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    store = Store.open(tmp_path / "store")
    lie = carded(store, stored(store, tmp_path), lambda fields: fields.update({field: value}))
    with pytest.raises(ManifestError):
        segments_of(store, manifest(lie))


def test_foreign_template_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    first, other = stored(store, tmp_path), stored(store, tmp_path, name="other-base", seed=5)
    assert first.trained != other.trained
    extra = of(named("d", unit(np.random.default_rng(9), 3)))
    delta = build_delta(store, "run-delta", extra, other, work=tmp_path)
    with pytest.raises(ManifestError, match="another template"):
        SegmentSearcher.open(store, manifest(first, delta))
    renamed = build_delta(store, "lie-delta", extra, replace(other, name="run-base"), work=tmp_path)
    with pytest.raises(ManifestError, match="another template"):
        SegmentSearcher.open(store, manifest(first, renamed))
    # The same lie on the card too: the centroids in the file tell.
    lie = carded(store, replace(renamed, name="lie-delta", trained=first.trained))
    assert segments_of(store, manifest(first, lie)) == [first, lie]
    with pytest.raises(CorruptObject, match="centroids"):
        SegmentSearcher.open(store, manifest(first, lie))
