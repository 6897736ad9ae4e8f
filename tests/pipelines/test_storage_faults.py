"""Answers of S3 that break off, get lost or say SlowDown, one request at a time, for each engine that asks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.errors import StoreError
from pipelines.sources import objects
from pipelines.storage import Store
from pipelines.stores.lance.opening import engine_options, open_table
from pipelines.stores.lance.pinning import move_tag, untag
from pipelines.stores.lance.table import restore
from tests.conftest import S3Server
from tests.s3_proxy import Asked, Fault, S3Proxy, first

FAULTS: tuple[Fault, ...] = ("500", "slow_down", "cut", "lost", "delay")
ROWS = pa.table({"id": pa.array(range(100), pa.int64())})


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    proxy = S3Proxy(s3.endpoint)
    with proxy.running():
        yield proxy


@pytest.fixture
def options(proxy: S3Proxy) -> dict[str, str]:
    return {"endpoint": proxy.endpoint, "region": "us-east-1", "allow_http": "true"}


@pytest.fixture
def store(s3: S3Server, options: dict[str, str]) -> Store:
    return Store.open(f"s3://{s3.bucket()}/p", options=options)


def of(kind: str) -> Any:
    def meant(asked: Asked) -> bool:
        return asked.kind == kind

    return meant


@pytest.mark.parametrize("fault", FAULTS)
def test_one_spoiled_answer_to_any_request_changes_nothing(store: Store, proxy: S3Proxy, tmp_path: Path, fault: Fault) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1024) * 11_000)
    steps: dict[str, Any] = {
        "put": lambda: store.put("a/b", b"x" * 5000),
        "get": lambda: store.get("a/b") == b"x" * 5000,
        "list": lambda: [info.key for info in store.list("a")] == ["a/b"],
        "begin": lambda: store.verify(store.put("b/big", big)),
        "part": lambda: store.verify(store.put("b/big", big)),
        "complete": lambda: store.verify(store.put("b/big", big)),
        "delete": lambda: store.delete("a/b"),
    }
    for kind, step in steps.items():
        proxy.plan = first(1, fault, only=of(kind))
        assert step() is not False, kind
        assert proxy.hit["rust", kind, fault] == 1, kind
    proxy.plan = None
    assert [info.key for info in store.list()] == ["b/big"]


def test_a_store_that_always_breaks_off_is_an_error_that_names_it(store: Store, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PAUSES_S", (0.0, 0.0))
    store.put("a/b", b"x")
    proxy.plan = lambda asked: "cut" if asked.kind == "list" else None
    with pytest.raises(StoreError, match=r"cannot list s3://.*/p/a: .*then run again"):
        list(store.list("a"))
    assert proxy.hit["rust", "list", "cut"] == 3


def test_ten_retries_outlast_seconds_of_slow_down(store: Store, proxy: S3Proxy) -> None:
    store.put("a/b", b"x")
    proxy.plan = first(6, "slow_down", only=of("get"))
    assert store.get("a/b") == b"x"
    assert proxy.hit["rust", "get", "slow_down"] == 6


@pytest.mark.parametrize("fault", FAULTS)
def test_one_spoiled_answer_changes_no_version_and_no_tag_of_a_table(store: Store, proxy: S3Proxy, options: Any, fault: Fault) -> None:
    uri = store.uri("t.lance")
    told = engine_options(uri, options)
    for version, kind in enumerate(("create", "put", "list", "get"), start=1):
        proxy.plan = None
        lance.write_dataset(ROWS, uri, mode="overwrite", storage_options=told)
        proxy.plan = first(1, fault, only=of(kind))
        dataset = open_table(uri, options=options)
        move_tag(uri, tag=f"t-{kind}", version=dataset.version, options=options)
        move_tag(uri, tag="moving", version=dataset.version, options=options)
        proxy.plan = None
        assert dataset.version == version
        assert {name: tag["version"] for name, tag in dataset.tags.list().items()}["moving"] == version
    proxy.plan = first(1, fault, only=of("delete"))
    untag(uri, "t-get", options)
    proxy.plan = first(1, fault, only=of("list"))
    restore(uri, version=1, options=options)
    assert open_table(uri, options=options).count_rows() == ROWS.num_rows


def test_a_tag_of_another_writer_is_not_taken_for_our_own(store: Store, proxy: S3Proxy, options: Any, s3: S3Server) -> None:
    uri = store.uri("t.lance")
    for _ in range(2):
        lance.write_dataset(ROWS, uri, mode="overwrite", storage_options=engine_options(uri, options))

    def overtaken(asked: Asked) -> Fault | None:
        if asked.kind == "create" and "/_refs/tags/" in asked.key:
            proxy.plan = None
            open_table(uri, options=s3.options).tags.create("t", 1)
        return None

    proxy.plan = overtaken
    with pytest.raises(StoreError, match="cannot tag version 2"):
        move_tag(uri, tag="t", version=2, options=options)


@pytest.mark.parametrize("fault", FAULTS)
def test_one_spoiled_answer_changes_nothing_of_a_catalog(store: Store, proxy: S3Proxy, options: Any, fault: Fault) -> None:
    store.put("catalog/a.parquet", b"x" * 5000)
    place, path = objects.locate(store.uri("catalog"), options)
    for kind in ("head", "list", "range"):
        proxy.plan = first(1, fault, only=of(kind))
        pins = objects.find(place, path)
        with objects.opened(place, pins[0].name, expected=pins[0]) as file:
            assert file.read() == b"x" * 5000
        assert proxy.hit["arrow", kind, fault] == 1, kind


def test_lance_is_told_of_patience_for_buckets_alone_and_options_win() -> None:
    assert engine_options("/srv/t.lance", {}) is None
    assert (engine_options("s3://b/t.lance", {}) or {})["client_max_retries"] == "10"
    assert (engine_options("s3://b/t.lance", {"client_max_retries": "1"}) or {})["client_max_retries"] == "1"
