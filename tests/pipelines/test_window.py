from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.contracts import Window
from pipelines.errors import InputError
from pipelines.window import resolve, span, zone

BERLIN = zone("Europe/Berlin")
NONE = timedelta(0)


def since(text: str, now: datetime, tz: ZoneInfo = BERLIN) -> str:
    start = resolve(text, now=now, tz=tz, lookback=NONE, watermark=None).since
    return "beginning" if start is None else start.isoformat(timespec="minutes")


def berlin(*parts: int, fold: int = 0) -> datetime:
    year, month, day, hour, minute = parts
    return datetime(year, month, day, hour, minute, tzinfo=BERLIN, fold=fold)


@pytest.mark.parametrize(
    ("text", "now", "expected"),
    [
        # Spring: 2026-03-29 has 23 hours, 02:00 to 03:00 does not exist.
        ("yesterday", berlin(2026, 3, 29, 12, 0), "2026-03-27T23:00+00:00"),
        ("today", berlin(2026, 3, 29, 12, 0), "2026-03-28T23:00+00:00"),
        ("yesterday", berlin(2026, 3, 30, 12, 0), "2026-03-28T23:00+00:00"),
        ("today", berlin(2026, 3, 30, 12, 0), "2026-03-29T22:00+00:00"),
        ("1d", berlin(2026, 3, 29, 12, 0), "2026-03-28T11:00+00:00"),
        ("24h", berlin(2026, 3, 29, 12, 0), "2026-03-28T10:00+00:00"),
        ("1d", berlin(2026, 3, 30, 2, 30), "2026-03-29T00:30+00:00"),
        ("2026-03-29T02:30", berlin(2026, 3, 30, 12, 0), "2026-03-29T00:30+00:00"),
        ("2026-03-29", berlin(2026, 3, 30, 12, 0), "2026-03-28T23:00+00:00"),
        # Autumn: 2026-10-25 has 25 hours, 02:00 to 03:00 comes twice.
        ("yesterday", berlin(2026, 10, 26, 12, 0), "2026-10-24T22:00+00:00"),
        ("today", berlin(2026, 10, 26, 0, 30), "2026-10-25T23:00+00:00"),
        ("1d", berlin(2026, 10, 26, 2, 30), "2026-10-25T00:30+00:00"),
        ("24h", berlin(2026, 10, 26, 2, 30), "2026-10-25T01:30+00:00"),
        ("today", berlin(2026, 10, 25, 2, 30, fold=1), "2026-10-24T22:00+00:00"),
        ("2026-10-25T02:30", berlin(2026, 10, 26, 12, 0), "2026-10-25T00:30+00:00"),
        ("90m", berlin(2026, 10, 25, 2, 30, fold=1), "2026-10-25T00:00+00:00"),
        # Other forms.
        ("beginning", berlin(2026, 5, 1, 0, 0), "beginning"),
        ("last", berlin(2026, 5, 1, 0, 0), "beginning"),
        ("1w", berlin(2026, 5, 8, 9, 0), "2026-05-01T07:00+00:00"),
        (" 2D ", berlin(2026, 5, 8, 9, 0), "2026-05-06T07:00+00:00"),
        ("2026-05-01T02:00:00Z", berlin(2026, 5, 8, 9, 0), "2026-05-01T02:00+00:00"),
        ("2026-05-01T02:00+05:30", berlin(2026, 5, 8, 9, 0), "2026-04-30T20:30+00:00"),
        ("20260501", berlin(2026, 5, 8, 9, 0), "2026-04-30T22:00+00:00"),
    ],
)
def test_since_means_local_days_and_real_hours(text: str, now: datetime, expected: str) -> None:
    assert since(text, now) == expected


def test_the_machine_zone_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    for machine in ("UTC", "Asia/Tokyo", "America/Los_Angeles"):
        monkeypatch.setenv("TZ", machine)
        time.tzset()
        assert since("yesterday", datetime(2026, 3, 29, 10, 0, tzinfo=UTC)) == "2026-03-27T23:00+00:00"
    monkeypatch.undo()
    time.tzset()


def test_midnight_that_a_zone_skips_is_the_instant_before_the_change() -> None:
    # Beirut goes from 24:00 to 01:00 on 2026-03-29.
    assert since("2026-03-29", datetime(2026, 3, 30, tzinfo=UTC), zone("Asia/Beirut")) <= "2026-03-28T22:00+00:00"


@pytest.mark.parametrize(
    "text", ["", "lately", "5", "h", "-1d", "2026-13-01", "2026-02-30", "99999999d", "1.5h", "2026-11-03 25:00", "yesterday; rm -rf /"]
)
def test_a_word_that_means_nothing_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(InputError, match="is not understood"):
        since(text, berlin(2026, 5, 8, 9, 0))


@pytest.mark.parametrize("text", ["999999d", "2027-01-01", "0h"])
def test_a_window_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="before"):
        since(text, berlin(2026, 5, 8, 9, 0))


def test_last_survives_a_clock_behind_the_watermark() -> None:
    now = datetime(2026, 5, 8, tzinfo=UTC)
    window = resolve("last", now=now, tz=BERLIN, lookback=timedelta(hours=6), watermark=now + timedelta(hours=1))
    assert window.since is not None
    assert timedelta(0) < now - timedelta(hours=6) - window.since < timedelta(seconds=1)


def test_last_is_the_watermark_minus_the_lookback() -> None:
    now = datetime(2026, 5, 8, tzinfo=UTC)
    window = resolve("last", now=now, tz=BERLIN, lookback=timedelta(hours=6), watermark=now - timedelta(days=1))
    assert window == Window(since=now - timedelta(hours=30), until=now)


@given(
    st.integers(1_577_836_800, 2_051_222_400),
    st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"]),
    st.integers(0, 72),
)
def test_yesterday_always_holds_all_of_yesterday(moment: int, name: str, hours: int) -> None:
    tz = zone(name)
    now = datetime.fromtimestamp(moment, tz=UTC)
    window = resolve("yesterday", now=now, tz=tz, lookback=timedelta(hours=hours), watermark=None)
    assert window.since is not None
    yesterday = now.astimezone(tz).date() - timedelta(days=1)
    start = window.since + timedelta(hours=hours)
    assert start.astimezone(tz).date() == yesterday
    assert (start - timedelta(minutes=1)).astimezone(tz).date() < yesterday


def test_unknown_zones_and_spans_say_what_to_write() -> None:
    for name in ("Europe/Berln", "../../etc/passwd", ""):
        with pytest.raises(InputError, match="unknown time zone"):
            zone(name)
    with pytest.raises(InputError, match="no length of time"):
        span("soon")
    assert span("90m") == timedelta(minutes=90)
