"""Whole nights with catalog, store and tower on S3, over HTTP and through a proxy that spoils requests: they end as those on disk do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.nightly import Night, open_store
from jobs.rebuilding import rebuild_live
from jobs.records import Record
from jobs.releasing import collect, roll_back
from jobs.settings import Settings, load
from pipelines import storage
from pipelines.errors import StoreError
from pipelines.manifest import Manifest
from pipelines.publish import current, history, open_manifest
from pipelines.reader import open_generation
from pipelines.storage import Store
from tests.conftest import S3Server
from tests.disturbed import ROOT, Shop, base_shop, query, quiet_night, unbuilt
from tests.s3_proxy import Asked, Fault, Plan, S3Proxy, every, first
from tests.shops import configure

pytestmark = pytest.mark.usefixtures("ray_cluster")

FAULTS: tuple[Fault, ...] = ("500", "slow_down", "cut", "lost")
# What is asked of S3 by a first build and by a night, and must have been spoiled at least once.
SPOILED = {("rust", kind) for kind in ("create", "put", "get", "range", "head", "list")} | {("arrow", "head"), ("arrow", "range")}
ID, SECRET, TOKEN = "CANARYID0000000001", "canary-secret-7d1f", "canary-token-94ab"


@dataclass(frozen=True)
class Bucket:
    """A project on this machine whose catalog and store are in a bucket, behind a proxy."""

    shop: Shop
    server: S3Server
    proxy: S3Proxy
    name: str

    @property
    def settings(self) -> Settings:
        return load(self.shop.config)

    @property
    def store(self) -> Store:
        return open_store(self.settings)

    @property
    def live(self) -> Manifest:
        entry = current(self.store, "prod")
        assert entry is not None
        return open_manifest(self.store, entry)

    def upload(self) -> None:
        """Put the catalog that the project has on disk into the bucket."""
        self._upload("catalog/part-00000.parquet")

    def upload_tower(self) -> None:
        """Put the project's tower into the bucket."""
        for path in sorted((self.shop.folder / "tower").rglob("*")):
            if path.is_file():
                self._upload(str(path.relative_to(self.shop.folder)))

    def _upload(self, name: str) -> None:
        self.server.client().upload_file(str(self.shop.folder / name), self.name, name)

    def moves(self) -> list[str]:
        return [entry.generation for entry in history(self.store, "prod")]

    def found(self) -> list[str]:
        """Return what a search through the reader finds in every product, with every byte checked."""
        store, live = self.settings.store, self.live.counts["live"]
        with open_generation(store.root, reload_s=None, verify="full", options=store.options) as reader:
            ids = reader.search(query(), live).column("id").to_pylist()
            assert sorted(ids) == sorted(reader.search(query(), live, engine="lance").column("id").to_pylist())
        return sorted(ids)

    def objects(self) -> dict[str, bytes]:
        """Return every object of the bucket, through another client."""
        client = self.server.client()
        keys = [item["Key"] for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.name) for item in page["Contents"]]
        return {key: client.get_object(Bucket=self.name, Key=key)["Body"].read() for key in keys}


def in_bucket(shop: Shop, server: S3Server, proxy: S3Proxy) -> Bucket:
    """Move a project's catalog, store and tower into a new bucket; its configuration names no credential."""
    bucket = Bucket(shop, server, proxy, server.bucket())
    told = {"endpoint": proxy.endpoint, "region": "us-east-1", "allow_http": "true"}
    configure(shop.config, source={"path": f"s3://{bucket.name}/catalog", "options": told})
    configure(shop.config, store={"root": f"s3://{bucket.name}/index", "options": dict(told)})
    configure(shop.config, tower={"path": f"s3://{bucket.name}/tower"})
    bucket.upload()
    bucket.upload_tower()
    return bucket


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    proxy = S3Proxy(s3.endpoint)
    with proxy.running():
        yield proxy


@dataclass(frozen=True)
class Nights:
    """The same two nights on disk and, with many requests spoiled and the first run killed, in a bucket."""

    disk: Manifest
    bucket: Bucket
    remote: Manifest
    moves: int
    killed: Killed
    resumed: Record


@pytest.fixture(scope="module")
def nights(ray_cluster: None, s3: S3Server, proxy: S3Proxy, tmp_path_factory: pytest.TempPathFactory) -> Nights:
    local = Shop(base_shop(tmp_path_factory))
    bucket = in_bucket(unbuilt(tmp_path_factory.mktemp("s3"), part_rows=16), s3, proxy)
    twin = Shop(Path(shutil.copytree(local.folder, tmp_path_factory.mktemp("twin") / "shop")))
    proxy.seen.clear()
    dead = killed(bucket)
    proxy.plan = spoiled()
    resumed = bucket.shop.run()
    assert resumed.facts.outcome == "published"
    rows = twin.rows()
    for shop in (twin, bucket.shop):
        shop.write(quiet_night(rows))
    bucket.upload()
    proxy.plan = spoiled()
    assert bucket.shop.run().facts.outcome == twin.run().facts.outcome == "published"
    proxy.plan = None
    return Nights(twin.live(), bucket, bucket.live, len(bucket.moves()), dead, resumed)


@dataclass
class Killer:
    """Kills a run when it is about to create its manifest; until then another plan holds."""

    plan: Plan
    run: subprocess.Popen[str] | None = None
    struck: bool = False

    def __call__(self, asked: Asked) -> Fault | None:
        if not self.struck and self.run is not None and asked.kind == "create" and asked.key.endswith("/manifest.json"):
            self.struck = True
            os.killpg(self.run.pid, signal.SIGKILL)
        return self.plan(asked)


@dataclass(frozen=True)
class Killed:
    """What a first build left that was killed: what it printed, its exit status, who signed, and every file and object."""

    said: str
    status: int
    signers: set[str]
    left: dict[str, bytes]
    published: bool


def killed(bucket: Bucket) -> Killed:
    """Run the command line with credentials in its environment, until it is about to create its manifest."""
    command = [sys.executable, "-m", "jobs.cli", "-v", "-c", str(bucket.shop.config), "run", "--since", "beginning"]
    secrets = {"AWS_ACCESS_KEY_ID": ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}
    bucket.proxy.plan = killer = Killer(spoiled())
    bucket.proxy.signers.clear()
    with tempfile.TemporaryDirectory(prefix="ce-", dir="/tmp") as ray:
        environment = os.environ | secrets | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=bucket.shop.folder, env=environment, start_new_session=True, **pipes) as run:
            killer.run = run
            said = run.communicate(timeout=300)[0]
        bucket.proxy.plan = None
        signers = set(bucket.proxy.signers)
        left = bucket.objects() | {str(path): path.read_bytes() for path in Path(ray).rglob("*") if path.is_file()}
    return Killed(said, run.returncode, signers, left, published=current(bucket.store, "prod") is not None)


def spoiled() -> Plan:
    """Lose the answers to the first lease, table version, tag and alias entry, and spoil every seventh request of a kind.

    Of reads, which are most of the requests, every 29th: each costs a pause.
    """
    aimed = [first(1, "lost", only=created(part)) for part in ("/leases/", "/_versions/", "/_refs/tags/", "/aliases/")]
    reads = every(29, FAULTS, only=lambda asked: asked.kind == "get")
    others = every(7, FAULTS, only=lambda asked: asked.kind != "get")
    return lambda asked: next((fault for plan in (*aimed, reads, others) if (fault := plan(asked))), None)


def created(part: str) -> Any:
    """Say whether a request creates an object of this kind."""

    def meant(asked: Asked) -> bool:
        return asked.kind == "create" and part in asked.key

    return meant


def test_nights_on_a_failing_s3_end_as_those_on_disk(nights: Nights) -> None:
    disk, remote = nights.disk, nights.remote
    assert disk.table is not None
    assert remote.table is not None
    assert remote.table.rows_digest == disk.table.rows_digest
    assert remote.counts == disk.counts
    assert remote.gates == disk.gates
    assert nights.moves == 2
    assert [entry.seq for entry in history(nights.bucket.store, "prod")] == [1, 2]


def test_every_kind_of_request_was_spoiled_in_every_way(nights: Nights) -> None:
    hit = nights.bucket.proxy.hit
    assert {(client, kind) for client, kind, _ in hit} >= SPOILED
    assert {fault for client, _, fault in hit if client == "rust"} == set(FAULTS)
    assert hit["rust", "create", "lost"] >= 8, "leases, table versions, tags and alias entries of two nights"


def test_a_killed_run_leaves_no_secret_anywhere_and_is_resumed(nights: Nights) -> None:
    dead = nights.killed
    assert dead.status == -signal.SIGKILL, dead.said
    assert dead.signers == {ID}, "the driver and its workers sign with what the environment says"
    assert any("/vectors/" in key for key in dead.left)
    assert any(key.endswith(".log") for key in dead.left)
    for secret in (SECRET, TOKEN):
        assert secret not in dead.said
        assert [name for name, data in dead.left.items() if secret.encode() in data] == []
    assert not dead.published
    assert nights.resumed.facts.actual.get("texts", 0) == 0


@pytest.fixture
def bucket(nights: Nights, tmp_path: Path) -> Bucket:
    """A copy of the project and of its bucket after both nights."""
    old = nights.bucket
    new = in_bucket(Shop(Path(shutil.copytree(old.shop.folder, tmp_path / "shop"))), old.server, old.proxy)
    client = new.server.client()
    for key, data in old.objects().items():
        client.put_object(Bucket=new.name, Key=key, Body=data)
    return new


def test_a_quiet_night_rollback_gc_and_rebuild_work_in_a_bucket(bucket: Bucket) -> None:
    before = bucket.live
    assert bucket.shop.run().facts.outcome == "nothing"
    assert bucket.live == before
    found = bucket.found()
    roll_back(bucket.settings, to=None, hold=False, reason="tried")
    assert bucket.live.generation == "g000001"
    assert bucket.found() != found
    roll_back(bucket.settings, to="g000002", hold=False, reason="tried")
    bucket.store.put("vectors/20200101T000000-00000000/part-00000.parquet", b"left by a dead run")
    collected = collect(bucket.settings, apply=True, keep=1, grace=timedelta(0))
    assert collected.removed is not None
    assert bucket.found() == found
    # The table is lost, and comes back from the vector log with the same content.
    client = bucket.server.client()
    for key in bucket.objects():
        if "/tables/" in key:
            client.delete_object(Bucket=bucket.name, Key=key)
    assert rebuild_live(bucket.settings, Night()).facts.outcome == "published"
    assert before.table is not None
    rebuilt = bucket.live.table
    assert rebuilt is not None
    assert rebuilt.rows_digest == before.table.rows_digest
    assert bucket.found() == found


def test_a_store_that_fails_for_good_publishes_nothing_and_a_rerun_finishes(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bucket.live
    rows = bucket.shop.rows()
    rows[3]["price"] = 12.34
    bucket.shop.write(rows)
    bucket.upload()
    monkeypatch.setattr(storage, "_RETRY", {"max_retries": 1})
    bucket.proxy.plan = lambda asked: "slow_down" if created("/aliases/")(asked) else None
    try:
        with pytest.raises(StoreError, match=r"cannot write s3://.*/aliases/prod/00000003\.json.*503.*run again") as caught:
            bucket.shop.run()
    finally:
        bucket.proxy.plan = None
    assert caught.value.exit_code == 1
    assert bucket.live == before
    rerun = bucket.shop.run()
    assert (rerun.facts.outcome, rerun.facts.exit_code) == ("published", 0)
    assert (rerun.facts.actual.get("texts", 0), bucket.live.parent) == (0, before.generation)
