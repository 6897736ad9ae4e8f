from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import telemetry
from pipelines.errors import InputError, StoreError
from pipelines.telemetry import Event, Observer, Pace, Progress, Recorder, Stage, StageTime, error_text, safe_fields

NOON = datetime(2026, 11, 4, 12, tzinfo=UTC)
HOSTILE = 'shirt\n12:00:00Z run.published\x1b[2J\u202e "x"\\'


class Clock:
    """A clock that a test moves; the time of day follows it."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.s)


class Kept:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.progress: list[Progress] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def on_progress(self, progress: Progress) -> None:
        self.progress.append(progress)


def recorder(clock: Clock, path: Path | None = None, *listeners: Any) -> Recorder:
    return Recorder("run-1", path=path, listeners=listeners, clock=clock, now=clock.now)


def lines(data: bytes) -> Iterator[dict[str, Any]]:
    assert data == b"" or data.endswith(b"\n")
    for line in data.split(b"\n")[:-1]:
        yield json.loads(line)


def test_stage_tells_its_rates_and_the_time_left() -> None:
    clock, kept = Clock(), Kept()
    with recorder(clock, None, kept).stage("embed", total=1000, unit="text") as stage:
        clock.s = 10
        stage.advance(200, tokens=8000)
    began, moved, ended = kept.progress
    assert (began.state, began.share, began.eta_s, began.rows_per_s) == ("began", 0.0, None, None)
    assert (moved.state, moved.rows_per_s, moved.tokens_per_s, moved.eta_s, moved.share) == ("moved", 20.0, 800.0, 40.0, 0.2)
    assert (ended.state, ended.rows, ended.rows_per_s, ended.eta_s) == ("ended", 200, 20.0, None)


def test_rates_are_recent_while_a_stage_runs_and_average_when_it_ended() -> None:
    clock, kept = Clock(), Kept()
    with recorder(clock, None, kept).stage("embed", total=10_000) as stage:
        for second in range(1, 101):
            clock.s = second
            stage.advance(100 if second <= 50 else 10)
    assert kept.progress[-2].rows_per_s == pytest.approx(10)
    assert kept.progress[-2].eta_s == pytest.approx((10_000 - 5500) / 10)
    assert kept.progress[-1].rows_per_s == pytest.approx(55)


def test_unknown_or_passed_total_promises_nothing_false() -> None:
    clock, kept = Clock(), Kept()
    observer = recorder(clock, None, kept)
    with observer.stage("read") as stage:
        clock.s = 1
        stage.advance(5)
    with observer.stage("apply", total=10) as stage:
        clock.s = 2
        stage.advance(15)
    with observer.stage("embed", total=0):
        pass
    assert (kept.progress[1].eta_s, kept.progress[1].share) == (None, None)
    assert (kept.progress[4].eta_s, kept.progress[4].share) == (0.0, 1.0)
    assert (kept.progress[-1].share, kept.progress[-1].rows_per_s) == (1.0, None)


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(0, 10**6)), min_size=1, max_size=60))
def test_pace_is_never_negative_and_never_beyond_its_fastest_step(steps: list[tuple[float, int]]) -> None:
    pace, now, rows, fastest = Pace(0.0), 0.0, 0, 0.0
    for wait, count in steps:
        now, rows = now + wait, rows + count
        pace.add(now, rows, 0)
        fastest = float("inf") if not wait and count else max(fastest, count / wait if wait else 0.0)
        rate, tokens = pace.rates()
        assert tokens is None
        assert rate is None or 0 <= rate <= fastest * (1 + 1e-6)


def test_pace_holds_a_bounded_number_of_samples() -> None:
    pace = Pace(0.0)
    for step in range(100_000):
        pace.add(step / 1000, step, step)
    assert len(pace._samples) < 110
    assert pace.rates()[0] == pytest.approx(1000, rel=0.01)


def test_listeners_are_not_told_more_often_than_anybody_reads() -> None:
    clock, kept = Clock(), Kept()
    with recorder(clock, None, kept).stage("embed", total=10_000) as stage:
        for _ in range(10_000):
            clock.s += 0.001
            stage.advance(1)
    assert 90 <= len(kept.progress) <= 102
    assert kept.progress[-1].rows == 10_000


def test_failed_stage_is_timed_told_and_raised(tmp_path: Path) -> None:
    clock, kept = Clock(), Kept()
    observer = recorder(clock, tmp_path / "events.jsonl", kept)

    def work() -> None:
        with observer.stage("apply", total=10) as stage:
            clock.s = 3
            stage.advance(4)
            raise StoreError("the disk is full")

    with pytest.raises(StoreError):
        work()
    assert observer.stages == (StageTime(name="apply", seconds=3.0, rows=4),)
    assert kept.progress[-1].state == "failed"
    assert [line["event"] for line in lines(observer.finished())] == ["stage.began", "stage.failed"]


def test_events_are_lines_of_json_with_time_name_and_run(tmp_path: Path) -> None:
    clock = Clock()
    observer: Observer = (recorded := recorder(clock, tmp_path / "events.jsonl"))
    observer.event("run.began", base="g000041", rows=np.int64(7), ratio=np.float32(0.5), since=None, full=True)
    clock.s = 1.5
    observer.event("gate.failed", level="warning", gate="recall", measured=float("nan"))
    assert recorded.finished() == (
        b'{"time":"2026-11-04T12:00:00.000+00:00","event":"run.began","run_id":"run-1","base":"g000041","rows":7,"ratio":0.5,'
        b'"since":null,"full":true}\n'
        b'{"time":"2026-11-04T12:00:01.500+00:00","event":"gate.failed","run_id":"run-1","level":"warning","gate":"recall","measured":"nan"}\n'
    )


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.datetimes() | st.just(HOSTILE),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4) | st.tuples(inner, inner),
)


@settings(max_examples=150)
@given(st.dictionaries(st.text().filter(lambda name: name not in telemetry._RESERVED), anything, max_size=5))
def test_no_value_breaks_a_line_or_moves_a_cursor(fields: dict[str, Any]) -> None:
    event = Event(time=NOON, name="any.thing", level="info", fields=safe_fields(fields))
    line = telemetry.event_line(event, run_id=HOSTILE)
    assert line.endswith(b"}\n")
    assert all(32 <= byte < 127 for byte in line[:-1])
    assert json.loads(line)["run_id"] == HOSTILE


def test_credentials_never_reach_an_event() -> None:
    shown = json.dumps(
        safe_fields(
            {
                "address": "postgresql://shop:CANARY@db/catalog?sslkey=CANARY",
                "signed": "https://bucket/x.parquet?X-Amz-Signature=CANARY&a=b done",
                "password": "CANARY",
                "options": {"secret_access_key": "CANARY", "api_key": "CANARY", "session_token": "CANARY", "region": "eu-central-1"},
                "secrets": {"CANARY": ["CANARY"]},
                "error": StoreError("PUT failed: AccountKey=CANARY; aws_secret_access_key: CANARY, Authorization was Bearer CANARY"),
                "engine": object(),
            }
        )
    )
    assert "CANARY" not in shown
    assert all(kept in shown for kept in ("eu-central-1", "https://bucket/x.parquet", "StoreError: PUT failed", "<object>"))


def test_catalog_text_is_withheld_and_counts_are_not() -> None:
    fields = safe_fields({"text": 41_877, "texts": "CANARY", "ids": ["CANARY"], "samples": {"add": ["CANARY"], "CANARY": {"a": "CANARY"}}})
    assert fields["text"] == 41_877
    assert "CANARY" not in json.dumps(fields)
    assert error_text(ValueError("could not convert 'CANARY'")) == "ValueError"
    assert error_text(InputError("unknown key `sourc`")) == "InputError: unknown key `sourc`"
    assert "No space left" in error_text(OSError(28, "No space left on device"))


def test_long_values_and_deep_ones_are_cut() -> None:
    deep: Any = "leaf"
    for _ in range(50):
        deep = {"down": deep}
    assert safe_fields({"count": -(10**6000), "counts": {10**6000: 1}}) == {"count": "about -2**19931", "counts": {"about 2**19931": 1}}
    fields = safe_fields({"long": "x" * 10**6, "many": list(range(10**5)), "deep": deep, "name-" * 100_000: "a-" * 100_000})
    assert len(json.dumps(fields)) < 10**6
    assert len(fields["long"]) == telemetry.MAX_VALUE_CHARACTERS
    assert len(fields["many"]) == 100
    assert fields["deep"] == {"down": {"down": {"down": "<1 items>"}}}


def test_event_names_and_reserved_fields_are_checked() -> None:
    observer = Recorder("run-1")
    for name in ("Run.began", "run began", "", "run..began", "run.began\n"):
        with pytest.raises(AssertionError):
            observer.event(name)
    with pytest.raises(AssertionError):
        observer.event("run.began", time="now")


def test_listener_that_raises_is_dropped_and_the_work_goes_on(tmp_path: Path) -> None:
    class Broken(Kept):
        def on_progress(self, progress: Progress) -> None:
            raise BrokenPipeError(progress.stage)

    broken, kept = Broken(), Kept()
    observer = recorder(Clock(), tmp_path / "events.jsonl", broken, kept)
    with observer.stage("read") as stage:
        stage.advance(1)
    assert [event.name for event in kept.events] == ["stage.began", "listener.dropped", "stage.ended"]
    assert [progress.state for progress in kept.progress] == ["began", "ended"]
    assert [line.get("listener") for line in lines(observer.finished())] == [None, "Broken", None]


def test_events_that_could_not_be_written_are_counted_and_told(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    kept = Kept()
    observer = recorder(Clock(), folder / "events.jsonl", kept)
    observer.event("run.began")
    folder.mkdir()
    observer.event("plan.made")
    assert observer.lost == 1
    assert [line["event"] for line in lines(observer.finished())] == ["plan.made", "events.lost"]
    assert [event.name for event in kept.events] == ["run.began", "plan.made", "events.lost"]
    assert observer.finished() == observer.finished()


def test_half_a_line_of_a_killed_run_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"run.began"}\n{"event":"plan.ma')
    observer = recorder(Clock(), path)
    observer.event("run.resumed")
    assert [line["event"] for line in lines(observer.finished())] == ["run.began", "run.resumed"]


def test_events_stop_at_their_limit_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "MAX_EVENTS_BYTES", 500)
    observer = recorder(Clock(), tmp_path / "events.jsonl")
    for number in range(100):
        observer.event("row.retried", number=number)
    found = list(lines(observer.finished()))
    assert found[-1]["event"] == "events.lost"
    assert len(found) - 1 + found[-1]["count"] == 100


def test_threads_may_report_together(tmp_path: Path) -> None:
    import sys
    from concurrent.futures import ThreadPoolExecutor

    def work(stage: Stage) -> None:
        for _ in range(20):
            stage.advance(3, tokens=5)

    switching = sys.getswitchinterval()
    observer = Recorder("run-1", path=tmp_path / "events.jsonl")
    sys.setswitchinterval(1e-6)  # threads take turns in the middle of a line of code
    try:
        with observer.stage("embed") as stage, ThreadPoolExecutor(8) as pool:
            for number in range(200):
                pool.submit(work, stage)
                pool.submit(observer.event, "part.written", number=number)
    finally:
        sys.setswitchinterval(switching)
    assert observer.stages[0].rows == 12_000
    assert observer.stages[0].tokens == 20_000
    assert len(list(lines(observer.finished()))) == 202
