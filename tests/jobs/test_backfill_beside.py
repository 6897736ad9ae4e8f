"""A backfill works beside the nightly run: it goes second, waits when told to, and what it made is never made twice."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.backfill import Choice, chosen, run_backfill
from jobs.nightly import Night
from jobs.records import Record
from jobs.settings import load
from jobs.watching import Beacon, Working, pause_backfill, resume_backfill, working
from pipelines.disk import Faults
from pipelines.errors import InputError, LeaseHeld
from pipelines.leases import Lease, acquire, held
from pipelines.pool import PoolOptions, pool
from pipelines.publish import read_manifest
from pipelines.stores import lance
from pipelines.telemetry import Event, Progress
from tests.disturbed import Meanwhile, Shop, base_shop, busy_night, content, faulty, now, quiet_night
from tests.jobs.commands import commands

pytestmark = pytest.mark.usefixtures("ray_cluster")
ALL = Choice(reason="all")


@pytest.fixture
def shop(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(Path(shutil.copytree(base_shop(tmp_path_factory), tmp_path / "shop")))


class Heard:
    """The events of a run."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def on_progress(self, progress: Progress) -> None:
        """Nothing to note."""

    def why(self, name: str) -> list[str]:
        return [str(event.fields["why"]) for event in self.events if event.name == name]


def backfill(shop: Shop, choice: Choice = ALL, *, meanwhile: Any = None, **night: Any) -> Record:
    """Make products again in this process."""
    settings = load(shop.config)
    asked = chosen(settings, choice, Night(command="backfill", **{"publish": True} | night))
    if meanwhile is None:
        return run_backfill(settings, asked)
    with faulty(meanwhile):
        return run_backfill(settings, asked)


def rebuilt(shop: Shop, folder: Path) -> str | None:
    """What one whole build of the same catalog contains."""
    fresh = Shop(folder)
    fresh.folder.mkdir()
    shutil.copy(shop.config, fresh.config)
    for name in ("catalog", "tower"):
        shutil.copytree(shop.folder / name, fresh.folder / name)
    assert fresh.run().facts.outcome == "published"
    return content(fresh).digest


def texts(shop: Shop) -> int:
    """How many different texts the live generation has."""
    pin = shop.live().table
    assert pin is not None
    rows = pa.concat_tables(lance.read_rows(shop.store.uri(pin.uri), version=pin.version, columns=["text_hash"], options={}))
    return len(rows["text_hash"].unique())


def test_a_night_is_published_while_a_backfill_embeds_and_both_end_right(
    shop: Shop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, nights = texts(shop), []
    refused: list[LeaseHeld] = []
    edited = busy_night(shop.rows())

    def night() -> None:
        with pytest.raises(LeaseHeld, match="is held by run") as caught:
            backfill(shop)
        refused.append(caught.value)
        shop.write(edited)
        nights.append(shop.run())

    record = backfill(shop, meanwhile=Meanwhile("run.part:embed", night))
    assert [error.exit_code for error in refused] == [11], "one backfill of a space at a time"
    assert [item.facts.outcome for item in nights] == ["published"]
    assert record.facts.outcome == "published"
    assert shop.moves()[1:] == [nights[0].facts.generation, record.facts.generation]
    assert shop.live().parent == nights[0].facts.generation
    assert content(shop).digest == rebuilt(shop, tmp_path / "fresh"), "the night's changes and the vectors made again are both there"
    made = record.facts.actual["embedded_texts"] + nights[0].facts.actual["embedded_texts"]
    listed = commands(capfd, shop.config)("runs", "--output", "json").json
    assert sorted(item["outcome"] for item in listed) == ["failed", "published", "published", "published"], (
        "a run is listed once, although a backfill has two folders"
    )
    assert read_manifest(shop.store, str(record.facts.generation)).run_id.partition("-ahead")[0] == record.run_id
    # What the night embedded the backfill makes again, because it was asked for all; nothing else twice.
    assert before <= made <= before + 2 * nights[0].facts.actual["embedded_texts"] + 2


def test_a_backfill_goes_second_and_waits_while_it_is_paused(shop: Shop) -> None:
    total, before, heard = texts(shop), len(shop.parts()), Heard()
    seen: list[tuple[int, Working]] = []

    def look() -> None:
        seen.extend((len(shop.parts()), item) for item in working(shop.store, now()) if item.kind == "backfill")

    def halt() -> None:
        run_id = pause_backfill(shop.store, None, reason="the sale begins")

        def another_writes() -> None:
            look()
            lease = acquire(shop.store, "tower-another", run_id="the-night", ttl=timedelta(minutes=5), clock=now)
            assert resume_backfill(shop.store, None) == run_id

            def ended() -> None:
                look()
                lease.release()

            threading.Timer(4.0, ended).start()

        threading.Timer(8.0, another_writes).start()

    record = backfill(shop, meanwhile=Meanwhile("run.part:embed", halt), listeners=(heard,))
    assert (record.facts.outcome, record.facts.actual["embedded_texts"]) == ("published", total)
    assert "the sale begins" in heard.why("embed.waits")[0]
    assert f"catalog-embed resume {record.run_id}" in heard.why("embed.waits")[0]
    [(paused, first), (hindered, second)] = seen
    assert (first.run_id, first.command) == (record.run_id, "backfill")
    assert "WAITS: paused by" in first.shown()
    assert before < paused < before + 8, "parts in flight were finished, and the others left for later"
    assert hindered == paused, "nothing was handed out between the pause and the other run"
    assert "the-night" in second.waits or "the sale" in second.waits


def test_only_a_backfill_is_paused_and_only_a_paused_one_resumed(shop: Shop) -> None:
    with pytest.raises(InputError, match=r"0 backfills work now .none.; so there is nothing to do"):
        pause_backfill(shop.store, None, reason="")
    with (
        holding(shop, "tower-x", "the-night"),
        pytest.raises(InputError, match=r"'the-night' is not among them. Only backfills are paused"),
    ):
        pause_backfill(shop.store, "the-night", reason="")
    with holding(shop, "backfill-x", "one"), holding(shop, "backfill-y", "two"):
        with pytest.raises(InputError, match=r"2 backfills work now .one, two.; name one"):
            pause_backfill(shop.store, None, reason="")
        with pytest.raises(InputError, match="0 backfills are paused"):
            resume_backfill(shop.store, None)
        with pytest.raises(InputError, match="is not among them"):
            pause_backfill(shop.store, "../../etc/passwd", reason="")


@dataclass
class Stopped(Faults):
    """Ends the process's work at the n-th time that a point is reached."""

    point: str
    at: int
    seen: int = 0

    def reach(self, point: str) -> None:
        self.seen += point == self.point
        if self.seen == self.at:
            self.seen += 1
            raise KeyboardInterrupt


def test_a_backfill_that_was_cut_off_makes_only_what_is_left_even_after_a_night(shop: Shop) -> None:
    total, before = texts(shop), set(shop.parts())
    with pytest.raises(KeyboardInterrupt):
        backfill(shop, meanwhile=Stopped(point="run.part:embed", at=4))
    assert len(set(shop.parts()) - before) >= 3
    shop.write(quiet_night(shop.rows()))
    assert shop.run().facts.outcome == "published"
    record = backfill(shop)
    assert record.facts.outcome == "published"
    assert 0 < record.facts.actual["embedded_texts"] <= total - 3 * 10, "what the first try paid for is not paid again"
    assert backfill(shop).facts.actual["embedded_texts"] >= total - 10, "asked for once more, all is made once more"


@contextmanager
def holding(shop: Shop, name: str, run_id: str) -> Iterator[Lease]:
    with held(shop.store, name, run_id=run_id, ttl=timedelta(minutes=5), clock=now) as lease:
        yield lease


def test_a_run_waits_for_a_lease_as_long_as_it_is_told_to(shop: Shop) -> None:
    name, heard = next(info.key.split("/")[1] for info in shop.store.list("leases")), Heard()
    with holding(shop, name, "another"), pytest.raises(LeaseHeld):
        shop.run(wait=timedelta(seconds=1), listeners=(heard,))
    assert "is held by run another" in heard.why("lease.waits")[0]
    lease = acquire(shop.store, name, run_id="another", ttl=timedelta(minutes=5), clock=now)
    threading.Timer(2.0, lease.release).start()
    assert shop.run(wait=timedelta(minutes=1)).facts.outcome == "nothing"


def test_status_watches_the_runs_of_other_processes_until_none_works(shop: Shop, capfd: pytest.CaptureFixture[str]) -> None:
    lease = acquire(shop.store, "backfill-x", run_id="the-backfill", ttl=timedelta(minutes=5), clock=now)
    beacon = Beacon(shop.store.root, {}, run_id="the-backfill", command="backfill")
    beacon.on_progress(Progress(number=1, stage="embed", unit="row", state="began", time=now(), rows=250, total=1000, rows_per_s=12.5))
    threading.Timer(1.5, lease.release).start()
    ended = commands(capfd, shop.config)("status", "--watch", "--every", 0.3)
    assert ended.code == 0
    assert "the-backfill  backfill  embed  250/1,000 rows  25%  12 rows/s" in ended.out
    assert ended.out.count("the-backfill") == 1, "a line for what is new"
    assert "prod  g000001" in ended.out
    (shop.folder / "index" / "runs" / "the-backfill" / "progress.json").write_text(json.dumps({"rows": "many", "stage": ["x"], "waits": 3}))
    with holding(shop, "backfill-x", "the-backfill"):
        assert working(shop.store, now())[0].shown() == "the-backfill  backfill  began"


def test_at_most_so_many_actors_embed_as_a_backfill_may_have() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0}] * 2
    assert pool(nodes, PoolOptions(), parts=100).actors == 8
    limited = pool(nodes, PoolOptions(at_most=3), parts=100)
    assert (limited.actors, limited.most) == (3, 3)
    assert pool(nodes, PoolOptions(at_most=30), parts=100).actors == 8
