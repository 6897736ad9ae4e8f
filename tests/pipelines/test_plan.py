from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipelines.contracts import PinnedObject, SourcePin, Window
from pipelines.errors import InputError, PlanError
from pipelines.layout import printable
from pipelines.plan import ActionCounts, Embedding, Limits, Plan, RowCounts, check
from pipelines.report import plan_text

NOW = datetime(2026, 11, 4, 1, 10, tzinfo=UTC)
ROWS = RowCounts(read=1000, live=990, deleted=6, duplicate=4, quarantined=0)
ACTIONS = ActionCounts(add=10, text=20, attr=30, delete=40, same=910)


def guards(**changes: Any) -> dict[str, tuple[bool, int]]:
    given: dict[str, Any] = {
        "rows": ROWS,
        "actions": ACTIONS,
        "base_live": 1000,
        "window": Window(since=None, until=NOW),
        "live_now": 990,
        "newest": NOW - timedelta(hours=1),
        "limits": Limits(),
    }
    return {guard.name: (guard.passed, guard.exit_code) for guard in check(**given | changes)}


@pytest.mark.parametrize(
    ("name", "code", "good", "bad"),
    [
        ("deletes", 12, {"actions": replace(ACTIONS, delete=50)}, {"actions": replace(ACTIONS, delete=51)}),
        ("duplicates", 12, {"rows": replace(ROWS, live=984, duplicate=10)}, {"rows": replace(ROWS, live=983, duplicate=11)}),
        ("completeness", 12, {"base_live": 1100}, {"base_live": 1101}),
        (
            "completeness",
            12,
            {"base_live": 0},
            {"base_live": 0, "live_now": 0, "rows": RowCounts(read=0, live=0, deleted=0, duplicate=0, quarantined=0)},
        ),
        ("freshness", 12, {"limits": Limits(max_age_s=3600)}, {"limits": Limits(max_age_s=3599)}),
        ("freshness", 12, {"limits": Limits(max_age_s=3600)}, {"limits": Limits(max_age_s=3600), "newest": None}),
        (
            "quarantine",
            13,
            {"rows": replace(ROWS, read=2000, live=1989, quarantined=1)},
            {"rows": replace(ROWS, read=2000, live=1988, quarantined=2)},
        ),
    ],
)
def test_guard_trips_just_past_its_limit(name: str, code: int, good: dict[str, Any], bad: dict[str, Any]) -> None:
    assert guards(**good)[name] == (True, code)
    assert guards(**bad)[name] == (False, code)


def test_a_narrow_window_is_not_measured_for_completeness_and_a_first_build_not_for_deletes() -> None:
    narrow = Window(since=NOW - timedelta(days=1), until=NOW)
    assert "completeness" not in guards(window=narrow, live_now=None)
    assert guards(window=narrow, live_now=899)["completeness"] == (False, 12)
    assert "deletes" not in guards(base_live=0)


def test_every_row_must_be_accounted_for() -> None:
    with pytest.raises(PlanError, match="1000 rows were read but 999 are accounted for"):
        replace(ROWS, live=989)


def test_limits_are_shares() -> None:
    with pytest.raises(InputError, match=r"Five percent is 0\.05"):
        Limits(max_delete_ratio=5)


def a_plan(**changes: Any) -> Plan:
    pin = SourcePin(kind="parquet", address="s3://shop/catalog", objects=(PinnedObject(name="a", size=1500, etag="x"),))
    plan = Plan(
        alias="prod",
        base="g000041",
        base_live=1000,
        window=Window(since=NOW - timedelta(hours=26), until=NOW),
        zone="Europe/Berlin",
        lookback_s=21600,
        source=pin,
        template="{{ title }}",
        template_digest="ab" * 32,
        schema_digest="cd" * 32,
        deletes="auto",
        deletes_checked=True,
        rows=ROWS,
        actions=ACTIONS,
        embedding=Embedding(rows=30, texts=28, reused=3, tokens=1_234_567),
        rejected={"no_text": 2},
        repaired={"whitespace": 7},
        unseen=0,
        newest=NOW,
        guards=check(
            rows=ROWS,
            actions=ACTIONS,
            base_live=1000,
            live_now=None,
            window=Window(since=NOW - timedelta(1), until=NOW),
            newest=NOW,
            limits=Limits(),
        ),
    )
    return replace(plan, **changes)


def test_a_plan_reads_as_promised() -> None:
    assert plan_text(a_plan()).splitlines() == [
        "Plan  prod  g000041 -> (new)                        rows read 1,000",
        "  window    2026-11-03 00:10+0100 .. 2026-11-04 02:10+0100 Europe/Berlin (lookback 6h)",
        f"  source    parquet s3://shop/catalog, 1 object, 1.5 kB, pin {a_plan().source.digest[:12]}",
        "  products  + 10 new   ~ 20 text   . 30 attributes only   - 40 deleted (4.00%)   = 910 same",
        "  rows      990 live   6 tombstones   4 duplicates   0 quarantined",
        "  embed     25 texts (2 identical, 3 embedded before), about 1.2 M tokens",
        "  guards    3 passed: duplicates, quarantine, deletes",
    ]


def test_what_was_not_checked_and_what_was_missed_is_loud() -> None:
    text = plan_text(a_plan(deletes="off", deletes_checked=False, unseen=5))
    assert "WARNING   deletes: NOT CHECKED" in text
    assert "5 products in the catalog but in neither the window nor the index" in text


def test_a_plan_without_changes_says_so() -> None:
    quiet = a_plan(
        actions=ActionCounts(add=0, text=0, attr=0, delete=0, same=1000), embedding=Embedding(rows=0, texts=0, reused=0, tokens=0)
    )
    text = plan_text(quiet)
    assert "no forward pass" in text
    assert "nothing to do" in text


def test_a_failed_guard_shows_measure_limit_code_and_advice() -> None:
    failed = check(
        rows=ROWS, actions=replace(ACTIONS, delete=400), base_live=1000, live_now=None, window=a_plan().window, newest=NOW, limits=Limits()
    )
    plan = a_plan(guards=failed)
    assert plan.exit_code == 12
    assert "GUARD     deletes: 40.0000%, limit 5.0000% (exit 12)" in plan_text(plan)


def test_a_wrong_source_outranks_a_full_quarantine() -> None:
    rows = RowCounts(read=1000, live=400, deleted=0, duplicate=300, quarantined=300)
    failed = check(rows=rows, actions=ACTIONS, base_live=1000, live_now=None, window=a_plan().window, newest=NOW, limits=Limits())
    assert a_plan(guards=failed).exit_code == 12
    only_quarantine = check(
        rows=replace(rows, live=700, duplicate=0),
        actions=ACTIONS,
        base_live=1000,
        live_now=None,
        window=a_plan().window,
        newest=NOW,
        limits=Limits(),
    )
    assert a_plan(guards=only_quarantine).exit_code == 13


def test_explain_gives_meaning_and_advice_for_every_reason() -> None:
    text = plan_text(a_plan(rejected={"no_text": 2, "duplicate_id": 1, "empty_text": 1}), explain=True)
    assert "2  no_text: every text field is empty" in text
    assert "1  duplicate_id: another row has the same id" in text
    assert "7  whitespace:" in text


def test_json_holds_the_whole_plan_and_no_number_that_json_lacks() -> None:
    stale = check(
        rows=ROWS,
        actions=ACTIONS,
        base_live=1000,
        live_now=None,
        window=Window(since=None, until=NOW),
        newest=None,
        limits=Limits(max_age_s=60),
    )
    data = json.loads(json.dumps(a_plan(guards=stale).to_json(), allow_nan=False))
    assert data["actions"] == {"add": 10, "text": 20, "attr": 30, "delete": 40, "same": 910}
    assert data["source"]["digest"] == a_plan().source.digest
    assert [guard["measured"] for guard in data["guards"] if guard["name"] == "freshness"] == [None]


def test_catalog_text_cannot_move_the_cursor_or_forge_a_line() -> None:
    assert printable("a\x1b[2J\nfake\u202eb ü") == "a\\x1b[2J\\nfake\\u202eb ü"
    text = plan_text(a_plan(), samples={"add": [("x\nGUARD forged", "Tent\nGUARD too"), ("\x1b[31mred", "y" * 500)]})
    assert "\x1b" not in text
    assert not any(line.startswith("GUARD") for line in text.splitlines())


def test_a_pin_says_what_moved() -> None:
    def pin(*objects: PinnedObject) -> SourcePin:
        return SourcePin(kind="parquet", address="x", objects=objects)

    a, b, c = (PinnedObject(name=name, size=1, etag="1") for name in "abc")
    assert pin(a, b).digest == pin(b, a).digest
    assert pin(a, b).moved(pin(replace(a, etag="2"), c)) == ["b is gone", "c is new", "a changed"]
    assert SourcePin.from_json(json.loads(json.dumps(pin(a, b).to_json()))) == pin(a, b)
