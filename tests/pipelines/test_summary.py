from __future__ import annotations

import json
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import summary
from pipelines.errors import ManifestError
from pipelines.metrics import render_prometheus
from pipelines.summary import Outcome, RunFacts, cost_of, metrics_of, summary_text
from pipelines.telemetry import StageTime

START = datetime(2026, 11, 4, 2, 10, 3, tzinfo=UTC)

FACTS = RunFacts(
    run_id="20261104T021003Z-ab12",
    command="run",
    alias="prod",
    base="g000041",
    generation="g000042",
    outcome="published",
    exit_code=0,
    started_at=START,
    ended_at=START + timedelta(seconds=192),
    stages=(
        StageTime(name="plan", seconds=41.2, rows=1_968_312),
        StageTime(name="embed", seconds=119.0, rows=54_929, tokens=4_893_280, unit="text"),
        StageTime(name="apply", seconds=12.5, rows=66_194),
        StageTime(name="publish", seconds=0.2),
    ),
    planned={"add": 18_204, "text": 41_877, "attr": 0, "delete": 6113, "texts": 54_930, "reused": 5151, "tokens": 4_900_000},
    actual={
        "read": 1_968_312,
        "add": 18_203,
        "text": 41_877,
        "attr": 0,
        "delete": 6114,
        "reused": 5151,
        "embedded_texts": 54_929,
        "embedded_tokens": 4_893_280,
        "quarantined": 39,
        "halvings": 2,
        "attempts": 1,
    },
    quarantined={"too_long": 1, "duplicate_id": 38},
    retries={"storage": 3},
    index_action="delta segment",
    index_reason="0.6 % changed",
    guards={"duplicates": True, "deletes": False},
    gates={"churn": "warned", "recall_at_10": "passed", "readback": "passed"},
    recall={"lance": 0.981, "faiss": 0.97249},
    bytes_written=1_234_567_890,
    generation_bytes=5_600_000_000,
    orphan_bytes=0,
    alias_seq=42,
    actor_s=118.0,
    actor_wait_s=29.5,
    cost=0.4261,
    currency="EUR",
)

GOLDEN = """\
Run  prod  g000041 -> g000042  published  in 3m12s
  run       20261104T021003Z-ab12  run  2026-11-04 02:10:03 .. 02:13:15 UTC  rows read 1,968,312
  products                   planned        actual
            new               18,204        18,203  -1
            text              41,877        41,877
            deleted            6,113         6,114  +1
            texts             54,930        54,929  -1
            reused             5,151         5,151
            tokens             4.9 M         4.9 M  -6,720 (-0.1%)
            batches halved for memory: 2
  rejected  39 rows in quarantine: duplicate_id 38, too_long 1
  stages    plan               41.2s    21%  1,968,312 rows  47,775 rows/s
            embed              1m59s    62%  54,929 texts  462 texts/s  41,120 tokens/s
            apply              12.5s     7%  66,194 rows  5,296 rows/s
            publish             0.2s     0%
  index     delta segment: 0.6 % changed
  recall    faiss 0.972, lance 0.981 at 10
  gates     2 passed, 1 warned (churn)
  written   1.2 GB, the generation refers to 5.6 GB
  cost      0.43 EUR for 1m58s of forward passes
  next      readers see it now as entry 42 of prod; `catalog-embed rollback` returns to the previous one (exit 0)
"""


def test_summary_of_a_published_run_is_laid_out_as_ever() -> None:
    assert summary_text(FACTS) == GOLDEN


def test_summary_of_a_night_without_changes_is_short() -> None:
    facts = RunFacts(
        run_id="r", command="run", alias="prod", base="g000041", outcome="nothing", exit_code=0, started_at=START, ended_at=START
    )
    assert summary_text(facts) == (
        "Run  prod  g000041 -> (none)  nothing  in 0.0s\n"
        "  run       r  run  2026-11-04 02:10:03 .. 02:10:03 UTC\n"
        "  next      nothing to do: the index is in step with the catalog (exit 0)\n"
    )


def test_failed_gates_are_named_with_what_to_do() -> None:
    facts = replace(
        FACTS, outcome="gates_failed", exit_code=10, alias_seq=None, gates={"churn": "failed", "recall": "failed", "a": "skipped"}
    )
    text = summary_text(facts)
    assert "  gates     0 passed, 1 skipped (a)\n  GATE      failed: churn, recall\n" in text
    assert text.endswith("  next      not published, the candidate is kept: `catalog-embed validate g000042` (exit 10)\n")


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_every_outcome_says_what_is_next(outcome: Outcome) -> None:
    last = summary_text(replace(FACTS, outcome=outcome)).splitlines()[-1]
    assert last.startswith("  next      ")
    assert "readers see it" not in last or outcome == "published"


def test_failed_run_shows_its_error_on_one_line_that_moves_no_cursor() -> None:
    text = summary_text(replace(FACTS, outcome="failed", exit_code=1, error="disk full\n  next  all is well\x1b[2J", index_reason="\u202e"))
    assert "  ERROR     disk full\\n  next  all is well\\x1b[2J\n" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_first_run_and_unreached_counts_are_shown_as_such() -> None:
    text = summary_text(replace(FACTS, base=None, actual={"read": 10}, outcome="interrupted", exit_code=14, cost=None))
    assert text.startswith("Run  prod  (nothing published) -> g000042  interrupted  in 3m12s\n")
    assert "            new               18,204             -\n" in text
    assert "1m58s of forward passes; set `embed: cost_per_hour` to see a price" in text


def test_cost_is_price_times_time_in_forward_passes() -> None:
    assert cost_of(1800.0, per_hour=2.5) == 1.25
    assert cost_of(1800.0, per_hour=None) is None
    assert "  cost      under 0.01 EUR for" in summary_text(replace(FACTS, cost=0.001))


def test_metrics_of_a_published_run() -> None:
    assert metrics_of(FACTS) == {
        ("last_success_timestamp_seconds", ()): FACTS.ended_at.timestamp(),
        ("last_run_timestamp_seconds", ()): FACTS.ended_at.timestamp(),
        ("last_publish_seq", ()): 42.0,
        ("run_exit_code", ()): 0.0,
        ("rows_read", ()): 1_968_312.0,
        ("rows_embedded", ()): 54_929.0,
        ("rows_skipped", ()): 5151.0,
        ("rows_deleted", ()): 6114.0,
        ("embed_cost", ()): 0.4261,
        ("embed_busy_ratio", ()): 0.8,
        ("generation_bytes", ()): 5.6e9,
        ("orphan_bytes", ()): 0.0,
        ("gpu_seconds_total", ()): 118.0,
        ("lease_conflicts_total", ()): 0.0,
        ("oom_halvings_total", ()): 2.0,
        ("embed_rows_per_second", ()): 54_929 / 119,
        ("embed_tokens_per_second", ()): 4_893_280 / 119,
        ("run_seconds", ("total",)): 192.0,
        ("run_seconds", ("plan",)): 41.2,
        ("run_seconds", ("embed",)): 119.0,
        ("run_seconds", ("apply",)): 12.5,
        ("run_seconds", ("publish",)): 0.2,
        ("rows_quarantined", ("too_long",)): 1.0,
        ("rows_quarantined", ("duplicate_id",)): 38.0,
        ("guard_result", ("duplicates",)): 1.0,
        ("guard_result", ("deletes",)): 0.0,
        ("gate_result", ("churn",)): 0.5,
        ("gate_result", ("recall_at_10",)): 1.0,
        ("gate_result", ("readback",)): 1.0,
        ("recall_at_10", ("lance",)): 0.981,
        ("recall_at_10", ("faiss",)): 0.97249,
        ("runs_total", ("published",)): 1.0,
        ("retries_total", ("storage",)): 3.0,
    }


@pytest.mark.parametrize(
    ("outcome", "code", "fresh"), [("published", 0, True), ("nothing", 0, True), ("built", 0, False), ("failed", 1, False)]
)
def test_only_a_run_that_keeps_the_index_in_step_counts_as_success(outcome: Outcome, code: int, *, fresh: bool) -> None:
    values = metrics_of(replace(FACTS, outcome=outcome, exit_code=code))
    assert (("last_success_timestamp_seconds", ()) in values) == fresh


names = st.text(min_size=1, max_size=20)
counts = st.dictionaries(names, st.integers(0, 2**63 - 1), max_size=4)
seconds = st.floats(0, 1e9)
generations = st.none() | st.integers(0, 10**17).map(lambda number: f"g{number:06d}")
times = st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=-9, minutes=-30))])).filter(lambda at: 1 < at.year < 9999)
records = st.builds(
    RunFacts,
    run_id=names,
    command=names,
    alias=names,
    outcome=st.sampled_from(get_args(Outcome)),
    exit_code=st.integers(0, 255),
    started_at=times,
    ended_at=times,
    base=generations,
    generation=generations,
    stages=st.lists(
        st.builds(StageTime, name=names, seconds=seconds, rows=st.integers(0, 10**12), tokens=st.integers(0, 10**12), unit=names),
        max_size=4,
    ).map(tuple),
    planned=counts | st.fixed_dictionaries({}, optional=dict.fromkeys(summary.COUNTS, st.integers(0, 10**9))),
    actual=counts | st.fixed_dictionaries({}, optional=dict.fromkeys([*summary.COUNTS, "read", "embedded_texts"], st.integers(0, 10**9))),
    quarantined=counts,
    retries=counts,
    index_action=st.none() | names,
    index_reason=st.none() | names,
    guards=st.dictionaries(names, st.booleans(), max_size=4),
    gates=st.dictionaries(names, st.sampled_from(["passed", "warned", "failed", "skipped"]), max_size=4),
    recall=st.dictionaries(names, st.floats(0, 1), max_size=3),
    bytes_written=st.integers(0, 2**60),
    generation_bytes=st.none() | st.integers(0, 2**60),
    orphan_bytes=st.none() | st.integers(0, 2**60),
    lease_conflicts=st.integers(0, 10),
    alias_seq=st.none() | st.integers(0, 10**8),
    error=st.none() | st.text(),
    actor_s=seconds,
    actor_wait_s=st.none() | seconds,
    cost=st.none() | seconds,
    currency=st.sampled_from(["", "EUR"]),
)


@settings(max_examples=120)
@given(records)
def test_state_survives_a_round_trip_and_everything_can_be_made_from_it(facts: RunFacts) -> None:
    data = facts.to_json()
    back = RunFacts.from_json(data)
    assert back == facts
    assert back.to_json() == data
    assert all(32 <= byte < 127 for byte in data[:-1])
    text = summary_text(facts)
    assert text.splitlines()[-1].startswith("  next      ")
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\n\n" not in text
    render_prometheus(metrics_of(facts), labels={"alias": facts.alias})


def test_state_of_format_1_is_read_as_one_that_does_not_say_what_format_2_added() -> None:
    old = json.loads(FACTS.to_json()) | {"format_version": 1}
    del old["guards"], old["actor_wait_s"]
    facts = RunFacts.from_json(json.dumps(old).encode())
    assert facts == replace(FACTS, guards={}, actor_wait_s=None)
    names = {name for name, _ in metrics_of(facts)}
    assert not names & {"guard_result", "embed_busy_ratio"}
    with pytest.raises(ManifestError, match="missing actor_wait_s, guards"):
        RunFacts.from_json(json.dumps(old | {"format_version": 2}).encode())


def test_actors_that_had_nothing_to_do_have_no_share_of_it() -> None:
    for spent, waited in ((0.0, 5.0), (0.0, None), (5.0, None)):
        assert ("embed_busy_ratio", ()) not in metrics_of(replace(FACTS, actor_s=spent, actor_wait_s=waited))


def test_every_field_has_a_parser() -> None:
    assert summary._PARSERS.keys() == {item.name for item in fields(RunFacts)}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("outcome", "splendid", "state.json.outcome: expected one of published, built"),
        ("exit_code", -1, "state.json.exit_code: expected a whole number"),
        ("started_at", "2026-11-04", "state.json.started_at: expected a UTC time"),
        ("generation", "../../etc", "state.json.generation: expected a generation id"),
        ("stages", {}, "state.json.stages: expected a list"),
        ("stages", [{"name": "plan"}], r"state.json.stages\[0\]: missing rows, seconds, tokens, unit"),
        ("actual", {"read": 1.5}, "state.json.actual.read: expected a whole number"),
        ("actual", [], "state.json.actual: expected an object"),
        ("gates", {"churn": "maybe"}, "state.json.gates.churn: expected one of passed"),
        ("guards", {"deletes": 1}, "state.json.guards.deletes: expected true or false"),
        ("recall", {"faiss": True}, "state.json.recall.faiss: expected a number"),
        ("actor_s", 10**400, "state.json.actor_s: the number is too large"),
        ("currency", None, "state.json.currency: expected a string"),
        ("surprise", 1, "state.json: unknown surprise"),
    ],
)
def test_state_that_was_edited_is_refused_by_name(name: str, value: Any, told: str) -> None:
    tree = json.loads(FACTS.to_json()) | {name: value}
    with pytest.raises(ManifestError, match=told):
        RunFacts.from_json(json.dumps(tree).encode())


def test_facts_that_cannot_be_true_are_refused() -> None:
    with pytest.raises(ManifestError, match="no finite number"):
        replace(FACTS, recall={"faiss": float("nan")})
    with pytest.raises(ManifestError, match="has no time zone"):
        replace(FACTS, ended_at=datetime(2026, 11, 4))  # noqa: DTZ001


def test_counts_of_numpy_are_kept_as_numbers() -> None:
    import numpy as np

    numbers: Any = {"actual": {"read": np.int64(7)}, "recall": {"faiss": np.float32(0.5)}}
    facts = replace(FACTS, **numbers)
    assert RunFacts.from_json(facts.to_json()) == facts
    assert len(replace(FACTS, error="x" * 10**7).to_json()) < summary.MAX_STATE_BYTES
