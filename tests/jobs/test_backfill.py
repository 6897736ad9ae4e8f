"""A backfill makes again what it was asked for, beside what is live, and leaves the watermark and the alias where they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs.backfill import Choice, chosen
from jobs.nightly import Night, run_night
from jobs.settings import load
from pipelines.manifest import Manifest
from pipelines.publish import current, read_manifest
from pipelines.sample.nights import changes
from pipelines.sample.spec import SampleSpec, day
from pipelines.stores import lance
from pipelines.telemetry import Event, Progress
from tests.jobs.commands import (
    DIMS,
    FIFTH,
    FOURTH,
    LIVE,
    PRODUCTS,
    SECOND,
    TEXTLESS,
    THIRD,
    Command,
    add_odd_products,
    commands,
    store_of,
)
from tests.shops import closing, configure, make_shop, read_catalog, run, write_catalog
from tests.towers import tiny_tower

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def catalog(two_nights: Path) -> pa.Table:
    """Its live rows, as the index has them."""
    rows = read_catalog(two_nights)
    return rows.filter(pc.and_(rows["is_active"], pc.not_equal(rows["sku"], TEXTLESS)))


@pytest.fixture
def config(two_nights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shop of one's own."""
    shutil.copytree(two_nights.parent, tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own" / "catalog-embed.yaml"


@pytest.fixture
def command(config: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Commands on it."""
    return commands(capfd, config)


def live(config: Path) -> str:
    entry = current(store_of(config), "prod")
    assert entry is not None
    return entry.generation


def manifest_of(config: Path, generation: str) -> Manifest:
    return read_manifest(store_of(config), generation)


def rows_of(config: Path, generation: str) -> pa.Table:
    """Every product of a generation, by id."""
    pin = manifest_of(config, generation).table
    assert pin is not None
    columns = ["id", "text_hash", "attr_hash", "vector"]
    rows = pa.concat_tables(lance.read_rows(store_of(config).uri(pin.uri), version=pin.version, columns=columns, options={}))
    return rows.combine_chunks().sort_by("id")


def planned(look: Command, *arguments: object) -> dict[str, int]:
    """What a backfill would do, by action, and how many texts it would embed."""
    found = look("backfill", *arguments, "--dry-run", "--output", "json")
    assert found.code == 0, found.err
    actions = found.json["actions"]
    return {name: actions[name] for name in ("add", "text", "attr", "delete")} | {"texts": found.json["embedding"]["texts"]}


def again(rows: int, texts: int) -> dict[str, int]:
    return {"add": 0, "text": rows, "attr": 0, "delete": 0, "texts": texts}


def texts_in(config: Path, rows: pa.Table) -> int:
    """How many different texts these products have in the index."""
    known = rows_of(config, SECOND)
    return len(pc.unique(known.filter(pc.is_in(known["id"], rows["sku"].combine_chunks()))["text_hash"]))


# What is chosen.


def test_a_filter_chooses_the_published_products_that_pass(two_nights: Path, look: Command, catalog: pa.Table) -> None:
    brand = catalog["brand"][0].as_py()
    wanted = catalog.filter(pc.equal(catalog["brand"], brand))
    assert planned(look, "--where", f"brand = '{brand}'") == again(wanted.num_rows, texts_in(two_nights, wanted))
    assert planned(look, "--where", "brand = 'nobody'") == again(0, 0)
    assert "no published product passes the filter" in look("backfill", "--where", "brand = 'nobody'", "--dry-run").err


def test_ids_are_given_or_read_from_a_file(two_nights: Path, look: Command, catalog: pa.Table, tmp_path: Path) -> None:
    ids = sorted(catalog["sku"].to_pylist())[:7]
    wanted = catalog.filter(pc.is_in(catalog["sku"], pa.array(ids)))
    assert planned(look, "--ids", ",".join(ids)) == again(7, texts_in(two_nights, wanted))
    (tmp_path / "ids").write_text("\n".join([*ids, "", ids[0], "nobody", "../../etc/passwd", "'; drop table"]) + "\n")
    assert planned(look, "--ids", f"@{tmp_path / 'ids'}") == again(7, texts_in(two_nights, wanted))


@pytest.mark.parametrize(
    ("since", "until"), [("2026-01-06", None), (None, "2025-06-01"), ("2025-03-01", "2025-09-01T12:30"), ("330d", None)]
)
def test_dates_choose_the_rows_of_those_dates_to_the_second(
    two_nights: Path, look: Command, catalog: pa.Table, since: str | None, until: str | None
) -> None:
    now = closing(1)
    low, high = (_moment(text, now) for text in (since, until))
    times = catalog["modified_at"]
    inside = pc.and_(
        pc.greater_equal(times, pa.scalar(low or datetime(1970, 1, 1, tzinfo=UTC), times.type)),
        pc.less(times, pa.scalar(high or now, times.type)),
    )
    wanted = catalog.filter(inside)
    assert 0 < wanted.num_rows < LIVE
    words = [*(("--from", since) if since else ()), *(("--to", until) if until else ()), "--now", now.isoformat()]
    assert planned(look, *words) == again(wanted.num_rows, texts_in(two_nights, wanted))


def _moment(text: str | None, now: datetime) -> datetime | None:
    """What a person means by these words in the shop's zone."""
    zone = ZoneInfo("Europe/Berlin")
    if text is None:
        return None
    if text.endswith("d"):
        return (now.astimezone(zone).replace(tzinfo=None) - timedelta(days=int(text[:-1]))).replace(tzinfo=zone)
    return datetime.fromisoformat(text).replace(tzinfo=zone)


def test_all_is_every_product_and_nothing_is_missing_or_failed(two_nights: Path, look: Command, catalog: pa.Table) -> None:
    assert planned(look, "--reason", "all") == again(LIVE, texts_in(two_nights, catalog))
    assert planned(look, "--reason", "missing") == again(0, 0)
    # The row without a text has failed and still has none.
    assert planned(look, "--reason", "failed") == again(0, 0)


def test_a_backfill_of_a_part_deletes_nothing(command: Command, config: Path) -> None:
    write_catalog(config, read_catalog(config).slice(3))
    for arguments in (["--reason", "all"], ["--reason", "missing"], ["--from", "2025-01-01"]):
        assert planned(command, *arguments)["delete"] == 0


def test_a_part_is_refused_where_every_product_is_concerned(command: Command, config: Path) -> None:
    before = config.read_text()
    configure(config, document={"filters": {"brand": "string"}})
    refused = command("backfill", "--ids", "CE-00000001")
    assert refused.code == 2
    assert f"the filter columns changed since {SECOND}" in refused.err
    config.write_text(before)
    configure(config, document={"template": "{{ title }}"})
    refused = command("backfill", "--reason", "all")
    assert refused.code == 2
    assert "another tower or template" in refused.err
    config.write_text(before)
    same = command("backfill", "--tower", "own/tower")
    assert same.code == 2
    assert f"{SECOND} was made by this very tower" in same.err
    assert {info.key.split("/")[1] for info in store_of(config).list("generations")} == {"g000001", SECOND}


# What is made.


def test_failed_and_missing_products_are_filled_in(command: Command, config: Path) -> None:
    """One row was rejected and is mended; another came so late that no window sees it. Neither has a new time."""
    data = read_catalog(config).to_pylist()
    mended = next(row for row in data if row["sku"] == TEXTLESS)
    mended |= {"title": "a mended title", "modified_at": datetime(2025, 5, 1, tzinfo=UTC)}
    late = data[0] | {"sku": "LATE-1", "title": "a title that came late", "modified_at": datetime(2025, 5, 1, tzinfo=UTC)}
    dearer = data[1] | {"price": 1.0, "modified_at": day(2)}
    write_catalog(config, pa.Table.from_pylist([data[0], dearer, *data[2:], late], schema=read_catalog(config).schema))

    failed = command("backfill", "--reason", "failed", "--output", "json")
    assert failed.code == 0, failed.err
    assert (failed.json["outcome"], failed.json["generation"], failed.json["actual"]["embedded_texts"]) == ("built", THIRD, 1)
    assert failed.json["planned"] | {"tokens": 0} == {"add": 1, "text": 0, "attr": 0, "delete": 0, "texts": 1, "reused": 0, "tokens": 0}
    assert live(config) == SECOND
    assert command("publish", THIRD).code == 0
    assert command("diff", SECOND, THIRD, "--output", "json").json["ids"] == {"add": [TEXTLESS], "text": [], "attr": [], "delete": []}

    missing = command("backfill", "--reason", "missing", "--publish", "--output", "json")
    assert (missing.code, missing.json["outcome"]) == (0, "published")
    assert command("diff", THIRD, FOURTH, "--output", "json").json["ids"] == {"add": ["LATE-1"], "text": [], "attr": [], "delete": []}
    assert manifest_of(config, FOURTH).window == manifest_of(config, SECOND).window
    # The night reads what it would have read, and finds the price that the backfills left alone.
    night = command("plan", "--now", closing(2).isoformat(), "--output", "json").json
    assert {name: night["actions"][name] for name in ("add", "text", "attr", "delete")} == {"add": 0, "text": 0, "attr": 1, "delete": 0}
    assert command("validate", FOURTH).code == 0


def test_a_filter_makes_only_its_products_again_and_publish_switches(
    two_nights: Path, command: Command, config: Path, catalog: pa.Table
) -> None:
    brand = catalog["brand"][0].as_py()
    wanted = catalog.filter(pc.equal(catalog["brand"], brand))
    found = command("backfill", "--where", f"brand = '{brand}'", "--output", "json")
    assert found.code == 0, found.err
    assert (found.json["outcome"], found.json["actual"]["embedded_texts"]) == ("built", texts_in(two_nights, wanted))
    assert found.json["planned"]["reused"] == 0
    assert live(config) == SECOND
    before, after = manifest_of(config, SECOND), manifest_of(config, THIRD)
    assert after.window == before.window
    assert sum(part.rows or 0 for part in after.parts) - sum(part.rows or 0 for part in before.parts) == wanted.num_rows
    assert _same_rows(config, SECOND, THIRD)
    assert command("publish", THIRD, "--reason", "new weights").out == f"{THIRD} is live as entry 3\n"
    assert command("rollback").out.startswith(SECOND)
    said = command("backfill", "--ids", "nobody,nobody else")
    assert said.code == 0
    assert "2 of the 2 ids have no live row in the catalog" in said.err


def _same_rows(config: Path, one: str, other: str) -> bool:
    before, after = rows_of(config, one), rows_of(config, other)
    columns = ["id", "text_hash", "attr_hash"]
    first, second = (np.stack(rows["vector"].to_numpy(zero_copy_only=False)) for rows in (before, after))
    return before.select(columns).equals(after.select(columns)) and bool(np.allclose(first, second, atol=1e-5))


@dataclass
class Meanwhile:
    """Does something once, when a stage of a run begins."""

    stage: str
    do: Callable[[], Any]
    done: list[Any] = field(default_factory=list)

    def on_event(self, event: Event) -> None:
        """Events are not waited for."""

    def on_progress(self, progress: Progress) -> None:
        if progress.stage == self.stage and not self.done:
            self.done.append(None)
            self.done[0] = self.do()


def _interrupt() -> None:
    raise KeyboardInterrupt


def backfill(config: Path, *listeners: Meanwhile, **choice: Any) -> Any:
    """Backfill in this process, with somebody who listens."""
    settings = load(config)
    night = chosen(settings, Choice(**choice), Night(now=closing(1), publish=False, command="backfill", listeners=listeners))
    return run_night(settings, night).facts


def test_all_goes_on_where_it_was_cut_off_and_begins_again_where_it_was_finished(two_nights: Path, config: Path, catalog: pa.Table) -> None:
    with pytest.raises(KeyboardInterrupt):
        backfill(config, Meanwhile("table", _interrupt), reason="all")
    resumed = backfill(config, reason="all")
    assert (resumed.outcome, resumed.actual["embedded_texts"]) == ("built", 0)
    assert _same_rows(config, SECOND, str(resumed.generation))
    once_more = backfill(config, reason="all")
    assert (once_more.outcome, once_more.actual["embedded_texts"]) == ("built", texts_in(two_nights, catalog))
    assert _same_rows(config, SECOND, str(once_more.generation))
    assert live(config) == SECOND
    window = manifest_of(config, SECOND).window
    assert manifest_of(config, str(once_more.generation)).window == window


def test_another_tower_grows_beside_the_live_index_and_only_publish_switches(
    two_nights: Path, command: Command, config: Path, catalog: pa.Table
) -> None:
    """A night comes while the new space grows. It is published by the old tower, and the new space then catches up."""
    tiny_tower(config.parent / "other", seed=11)
    truth = changes(SampleSpec(products=PRODUCTS), night=2).to_pydict()["action"]

    def nightly() -> Any:
        make_shop(config.parent, night=2)
        add_odd_products(config)
        return run(config, at=2).facts

    before = (config.parent / "catalog" / "part-00000.parquet").read_bytes()
    night = Meanwhile("table", nightly)
    grown = backfill(config, night, tower=Path("own/other"))
    (between,) = night.done
    assert (between.outcome, between.base, between.planned["add"], between.planned["attr"]) == (
        "published", SECOND, truth.count("add"), truth.count("attr"),
    )  # fmt: skip
    assert (grown.outcome, grown.actual["embedded_texts"]) == ("built", texts_in(two_nights, catalog))
    assert (grown.generation, between.generation) == (THIRD, FOURTH)
    assert before != (config.parent / "catalog" / "part-00000.parquet").read_bytes()
    assert live(config) == FOURTH
    assert manifest_of(config, FOURTH).tower == manifest_of(config, SECOND).tower != manifest_of(config, THIRD).tower

    stale = command("publish", THIRD)
    assert stale.code == 1
    assert f"was built on {SECOND}, but `prod` has moved on to {FOURTH}" in stale.err
    assert "Build it again with the same command; what is embedded is kept" in stale.err
    assert live(config) == FOURTH

    caught_up = command("backfill", "--tower", "own/other", "--now", closing(2).isoformat(), "--output", "json")
    assert caught_up.code == 0, caught_up.err
    assert (caught_up.json["generation"], caught_up.json["base"]) == (FIFTH, THIRD)
    assert caught_up.json["actual"]["embedded_texts"] == truth.count("add") + truth.count("text")
    old, new = rows_of(config, FOURTH), rows_of(config, FIFTH)
    columns = ["id", "text_hash", "attr_hash"]
    assert old.select(columns).equals(new.select(columns))
    assert old["vector"].type == new["vector"].type == pa.list_(pa.float32(), DIMS)
    assert not old["vector"].equals(new["vector"])
    assert command("search", "x").out.startswith(FOURTH)

    switched = command("publish", FIFTH)
    assert switched.out == f"{FIFTH} is live as entry 4\n"
    assert "change `tower: path` before the next run" in switched.err
    assert command("search", "x").out.startswith(FIFTH)

    make_shop(config.parent, night=3)
    add_odd_products(config)
    stopped = command("run", "--now", closing(3).isoformat())
    assert stopped.code == 12
    assert "GUARD     tower" in stopped.out
    assert "set `tower: path`" in stopped.out
    assert live(config) == FIFTH

    configure(config, tower={"path": "other"})
    third_night = command("run", "--now", closing(3).isoformat(), "--output", "json")
    assert (third_night.code, third_night.json["base"]) == (0, FIFTH)
    third = changes(SampleSpec(products=PRODUCTS), night=3).to_pydict()["action"]
    assert {name: third_night.json["planned"][name] for name in ("add", "text", "attr", "delete")} == {
        name: third.count(name) for name in ("add", "text", "attr", "delete")
    }
    assert third_night.json["actual"]["embedded_texts"] == third.count("add") + third.count("text")
    assert command("rollback", "--to", FOURTH).code == 0
    assert command("search", "x").out.startswith(FOURTH)
