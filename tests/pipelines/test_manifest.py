from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.contracts import IndexUse, PinnedObject, SourcePin, Window
from pipelines.errors import ManifestError
from pipelines.manifest import (
    MANIFEST_FORMAT,
    MAX_MANIFEST_BYTES,
    Manifest,
    ManifestObject,
    TablePin,
    check_generation,
    generation_number,
    next_generation_id,
)
from tests.generations import START, sample_manifest

GOLDEN = (
    b'{"attachments":[],"config_digest":"efefefefefefefefefefefefefefefef","counts":{"live":2,"rejected":0},'
    b'"created_at":"2026-11-04T02:10:00+00:00","format_version":2,"gates":{"churn":"warned","recall_at_10":"passed"},'
    b'"generation":"g000001","indexes":{"faiss":{"action":"delta","reason":"5 are new","recall":0.975,"search":{"nprobe":24},'
    b'"target":0.97,"trained_recall":null,"trigger":"recall"}},"parent":null,"parts":[{"key":"vectors/run-1/p.parquet","role":"vectors","rows":2,'
    b'"sha256":"0000000000000000000000000000000000000000000000000000000000000000","size":7}],"run_id":"run-1",'
    b'"schema_digest":"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd","segments":[],"source":{"address":"s3://shop/catalog/","kind":"parquet",'
    b'"objects":[{"etag":"e1","name":"day=1/a.parquet","size":9}]},"table":null,'
    b'"template_digest":"abababababababababababababababab","tombstones":[],"tower":"3fa1c9","versions":{"catalog-embed":"0.1.0"},'
    b'"window":{"bounded":false,"since":null,"until":"2026-11-04T02:05:00+00:00"}}\n'
)


def part(number: int = 0, **changes: Any) -> ManifestObject:
    base = ManifestObject(key=f"vectors/run-1/p{number}.parquet", size=7, sha256=f"{number:064x}", role="vectors", rows=2)
    return replace(base, **changes)


texts = st.text(max_size=12)
digests = st.from_regex(r"[A-Za-z0-9._:-]{1,20}", fullmatch=True)
counts = st.integers(0, 2**63 - 1)
zones = st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=45)), timezone(-timedelta(hours=8))])
moments = st.datetimes(min_value=datetime(1990, 1, 1), max_value=datetime(2100, 1, 1), timezones=zones)  # noqa: DTZ001 - Hypothesis adds the zone
objects = st.lists(
    st.builds(
        ManifestObject,
        key=st.uuids().map(str),
        size=counts,
        sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
        role=texts,
        rows=st.none() | counts,
    ),
    max_size=3,
).map(tuple)
windows = st.tuples(st.none() | st.timedeltas(timedelta(seconds=1), timedelta(days=900)), moments, st.booleans()).map(
    lambda drawn: Window(since=None if drawn[0] is None else drawn[1] - drawn[0], until=drawn[1], bounded=drawn[2])
)
pins = st.builds(
    SourcePin,
    kind=texts,
    address=texts,
    objects=st.lists(st.builds(PinnedObject, name=texts, size=counts, etag=texts), max_size=3).map(tuple),
)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
tuned = st.dictionaries(texts, counts, max_size=2)
uses = st.builds(
    IndexUse, action=texts, trigger=st.none() | texts, reason=texts, search=tuned, recall=numbers, target=numbers, trained_recall=numbers
)
manifests = st.builds(
    Manifest,
    generation=st.integers(10, 10**12).map(lambda number: f"g{number:06d}"),
    parent=st.none() | st.integers(1, 9).map(lambda number: f"g{number:06d}"),
    created_at=moments,
    run_id=texts,
    source=pins,
    window=windows,
    tower=digests,
    template_digest=digests,
    schema_digest=digests,
    config_digest=digests,
    table=st.none() | st.builds(TablePin, uri=texts, version=counts, tag=texts, rows_digest=st.none() | digests, objects=objects),
    parts=objects,
    segments=objects,
    tombstones=objects,
    attachments=objects,
    indexes=st.dictionaries(texts, uses, max_size=2),
    counts=st.dictionaries(texts, counts, max_size=3),
    gates=st.dictionaries(texts, st.sampled_from(["passed", "warned", "failed", "skipped"]), max_size=3),
    versions=st.dictionaries(texts, texts, max_size=3),
)


@given(manifest=manifests)
def test_json_round_trip_is_exact(manifest: Manifest) -> None:
    data = manifest.to_json()
    again = Manifest.from_json(data)
    assert again == manifest
    assert again.to_json() == data
    assert again.content_digest == manifest.content_digest


@given(manifest=manifests)
def test_bytes_are_canonical(manifest: Manifest) -> None:
    data = manifest.to_json()
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode() + b"\n"


USE = IndexUse(action="delta", trigger="recall", reason="5 are new", search={"nprobe": 24}, recall=0.975, target=0.97)


def test_the_format_has_not_changed() -> None:
    manifest = sample_manifest(parts=(part(key="vectors/run-1/p.parquet"),), indexes={"faiss": USE})
    assert manifest.to_json() == GOLDEN
    assert Manifest.from_json(GOLDEN) == manifest


def test_format_1_is_read_as_one_that_says_nothing_of_its_indexes() -> None:
    tree = json.loads(GOLDEN)
    old = json.dumps({**{key: value for key, value in tree.items() if key != "indexes"}, "format_version": 1}).encode()
    assert Manifest.from_json(old) == replace(Manifest.from_json(GOLDEN), indexes={})
    with pytest.raises(ManifestError, match="missing indexes"):
        Manifest.from_json(old.replace(b'"format_version": 1', b'"format_version": 2'))


def test_the_same_moment_in_another_zone_is_the_same_manifest() -> None:
    zone = timezone(timedelta(hours=2))
    moved = sample_manifest(
        created_at=START.astimezone(zone), window=Window(since=None, until=(START - timedelta(minutes=5)).astimezone(zone))
    )
    assert moved.to_json() == sample_manifest().to_json()


def test_every_key_is_needed_and_no_other_is_allowed() -> None:
    tree = json.loads(GOLDEN)
    assert tree.keys() == {field.name for field in fields(Manifest)} | {"format_version"}
    for name in tree.keys() - {"format_version"}:
        with pytest.raises(ManifestError, match=rf"x\.json: missing {name}"):
            Manifest.from_json(json.dumps({k: v for k, v in tree.items() if k != name}).encode(), where="x.json")
    with pytest.raises(ManifestError, match=r"x\.json: unknown extra"):
        Manifest.from_json(json.dumps(tree | {"extra": 1}).encode(), where="x.json")
    tree["parts"][0]["colour"] = "red"
    with pytest.raises(ManifestError, match=r"x\.json\.parts\[0\]: unknown colour"):
        Manifest.from_json(json.dumps(tree).encode(), where="x.json")


@pytest.mark.parametrize("wrong", [None, True, -1, 1.5, 2**63, "", "text", [], {}, [1], {"a": 1}])
def test_a_wrong_type_anywhere_is_named(wrong: Any) -> None:
    tree = json.loads(GOLDEN)
    for name, right in tree.items():
        if name in ("format_version", "run_id") or type(wrong) is type(right) or (name in ("parent", "table") and wrong is None):
            continue
        with pytest.raises(ManifestError, match=rf"m\.{name}"):
            Manifest.from_json(json.dumps(tree | {name: wrong}).encode(), where="m")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("generation", "g42", "generation id"),
        ("generation", "g٠٠٠٠٤٢", "generation id"),
        ("generation", "../../etc", "generation id"),
        ("generation", "g0000042", "no generation id"),
        ("created_at", "yesterday", "expected a UTC time"),
        ("created_at", "2026-11-04T02:10:00", "expected a UTC time"),
        ("created_at", "2026-11-04T04:10:00+02:00", "expected a UTC time"),
        ("created_at", "2026-11-04 02:10:00+00:00", "expected a UTC time"),
        ("created_at", "0001-01-01T00:00:00+09:00", "expected a UTC time"),
        ("tower", "a/b", "expected a digest"),
        ("gates.churn", "fine", "expected one of passed, warned, failed, skipped"),
        ("counts.live", True, "expected a whole number"),
        ("parts.0.sha256", "AB" * 32, "expected a sha256"),
        ("parts.0.size", -7, "expected a whole number"),
        ("parts.0.rows", "2", "expected a whole number"),
        ("window.bounded", 0, "expected true or false"),
        ("window.since", "2027-01-01T00:00:00+00:00", "the window is empty"),
        ("source.objects.0.size", 1.0, "expected a whole number"),
        ("parent", "g000001", "is not older"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(path: str, value: Any, words: str) -> None:
    tree = json.loads(GOLDEN)
    spot = tree
    *folders, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in folders:
        spot = spot[step]
    spot[last] = value
    with pytest.raises(ManifestError, match=f"^m.*{re.escape(words)}"):
        Manifest.from_json(json.dumps(tree).encode(), where="m")


def test_a_newer_format_says_upgrade_before_anything_else() -> None:
    data = json.dumps({"format_version": MANIFEST_FORMAT + 1, "new_idea": {}}).encode()
    with pytest.raises(
        ManifestError, match=r"m: written by a newer version of catalog-embed \(format 3, this one reads up to 2\): upgrade"
    ):
        Manifest.from_json(data, where="m")


@pytest.mark.parametrize("version", [None, 0, -1, True, 1.0, "1"])
def test_a_format_that_is_no_version_is_refused(version: Any) -> None:
    with pytest.raises(ManifestError, match="format_version"):
        Manifest.from_json(json.dumps(json.loads(GOLDEN) | {"format_version": version}).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        GOLDEN[:-40],
        GOLDEN + b"{}",
        b"\xff" + GOLDEN,
        GOLDEN.replace(b'"live":2', b'"live":2,"live":3'),
        GOLDEN.replace(b'"live":2', b'"live":NaN'),
        GOLDEN.replace(b'"live":2', b'"live":' + b"9" * 5000),
        b'{"a":' * 100_000,
    ],
)
def test_what_is_no_manifest_is_a_manifest_error(data: bytes) -> None:
    with pytest.raises(ManifestError, match=r"^m: "):
        Manifest.from_json(data, where="m")


@given(at=st.integers(0, len(GOLDEN) - 1), bit=st.integers(0, 7))
@settings(max_examples=300)
def test_a_flipped_bit_is_refused_or_gives_other_bytes(at: int, bit: int) -> None:
    damaged = bytearray(GOLDEN)
    damaged[at] ^= 1 << bit
    try:
        found = Manifest.from_json(bytes(damaged))
    except ManifestError:
        return
    # Only white space may change and still mean the same; the sha256 in the publish log catches that too.
    assert found.to_json() != GOLDEN or bytes(damaged).split() == GOLDEN.split()


def test_an_oversized_manifest_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ManifestError, match=f"exceed the limit of {MAX_MANIFEST_BYTES}"):
        Manifest.from_json(b"x" * (MAX_MANIFEST_BYTES + 1))


def test_no_object_is_listed_twice_and_all_are_found() -> None:
    table = TablePin(uri="tables/3fa1c9.lance", version=7, tag="g000001", objects=(part(5, role="table"),))
    manifest = sample_manifest(
        parts=(part(1),), segments=(part(2, role="faiss"),), tombstones=(part(3),), attachments=(part(4, rows=None),), table=table
    )
    assert {item.sha256 for item in manifest.objects} == {f"{number:064x}" for number in range(1, 6)}
    with pytest.raises(ManifestError, match=r"p1\.parquet is listed twice"):
        sample_manifest(parts=(part(1),), segments=(part(1),))


def test_the_content_digest_ignores_when_who_and_under_which_names() -> None:
    first = sample_manifest(parts=(part(1), part(2)))
    other = replace(
        first,
        generation="g000009",
        parent="g000003",
        run_id="run-2",
        created_at=START + timedelta(days=1),
        parts=(part(2, key="vectors/run-2/b"), part(1, key="vectors/run-2/a")),
        attachments=(part(8, role="attachment"),),
    )
    assert other.content_digest == first.content_digest


@pytest.mark.parametrize(
    "change",
    [
        {"tower": "000000"},
        {"template_digest": "x"},
        {"schema_digest": "x"},
        {"counts": {"live": 3, "rejected": 0}},
        {"parts": (part(1),)},
        {"parts": (part(1), part(2, sha256="f" * 64))},
        {"parts": (part(1), part(2, rows=None))},
        {"parts": (part(1),), "segments": (part(2),)},
        {"tombstones": (part(3),)},
        {"table": TablePin(uri="tables/t.lance", version=1, tag="t")},
    ],
)
def test_the_content_digest_follows_the_content(change: dict[str, Any]) -> None:
    first = sample_manifest(parts=(part(1), part(2)))
    assert replace(first, **change).content_digest != first.content_digest


def test_the_content_digest_of_a_table_is_its_rows_and_not_its_files() -> None:
    table = TablePin(uri="tables/t", version=1, tag="a", rows_digest="one")

    def digest(pinned: TablePin) -> str:
        return sample_manifest(table=pinned).content_digest

    assert digest(table) == digest(replace(table, version=9, tag="b", objects=(part(1),)))
    assert digest(table) != digest(replace(table, rows_digest="two"))


def test_generation_ids_are_validated_and_counted_as_numbers() -> None:
    assert check_generation("g000042") == "g000042"
    assert generation_number("g1000000") == 1_000_000
    for wrong in ("", "g", "g42", "42", "G000042", "g000042 ", "g000042\n", "g0000042", "../g000042", "g" + "9" * 30):
        with pytest.raises(ManifestError, match="no generation id"):
            check_generation(wrong)


@given(numbers=st.sets(st.integers(1, 10**9)))
def test_the_next_generation_id_is_new_and_above_all(numbers: set[int]) -> None:
    fresh = next_generation_id([f"g{number:06d}" for number in numbers])
    assert generation_number(fresh) == max(numbers, default=0) + 1


def test_times_without_a_zone_are_refused() -> None:
    with pytest.raises(ManifestError, match=r"created_at .* has no time zone"):
        sample_manifest(created_at=START.replace(tzinfo=None))
