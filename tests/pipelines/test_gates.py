"""Gates: all of them always, failures with value, limit and ids, nothing unmeasured passes, waivers end on their day."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import manifest
from pipelines.errors import InputError, ManifestError
from pipelines.gate_advice import GATES
from pipelines.gates import (
    MAX_IDS,
    FilteredRecall,
    Gate,
    GateLimits,
    Measured,
    Verdict,
    Waiver,
    failed,
    from_json,
    gates_text,
    judge,
    to_json,
    verdicts,
)

TODAY = date(2026, 11, 4)
LIMITS = GateLimits()


def band(recall: float, error: float = 0.0, name: str = "1 to 10 %") -> FilteredRecall:
    return FilteredRecall(band=name, recall=recall, error=error, queries=18, example="brand = 'Acme'", rows=1234)


FOUND = "1 to 10 % of the products pass, recall 0.900: brand = 'Acme' (1,234 products)"

GOOD = Measured(
    expected_rows=100,
    parts_rows=100,
    table_rows=100,
    index_rows=100,
    deleted_found=(),
    self_retrieval=1.0,
    non_finite=(),
    norm_gap=1e-7,
    identical=0.0,
    tower="3fa1c9",
    fingerprints=("3fa1c9",),
    replay_cosine=0.99999,
    recall={"faiss": 0.98, "lance": 0.96},
    recall_before={"faiss": 0.981, "lance": 0.96},
    recall_filtered={"faiss": (band(0.99), band(0.98)), "lance": (band(1.0),)},
    parity=0.97,
    churn=0.1,
    delete_ratio=0.01,
    corrupt=(),
    unindexed={"vector_idx": 0, "text_idx": 0},
)

# One way for each gate to fail, with the ids that it must show.
BAD: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "counts": ({"index_rows": 99}, ()),
    "deleted": ({"deleted_found": ("gone-1", "gone-2")}, ("gone-1", "gone-2")),
    "self_retrieval": ({"self_retrieval": 0.9, "missing": ("lost-1",)}, ("lost-1",)),
    "finite": ({"non_finite": ("nan-1",)}, ("nan-1",)),
    "unit": ({"norm_gap": 0.5, "non_unit": ("long-1",)}, ("long-1",)),
    "identical": ({"identical": 0.9, "identical_ids": ("same-1", "same-2")}, ("same-1", "same-2")),
    "fingerprint": ({"fingerprints": ("3fa1c9", "77aa00")}, ()),
    "replay": ({"replay_cosine": 0.99, "replay_ids": ("drift-1",)}, ("drift-1",)),
    "recall_faiss": ({"recall": {"faiss": 0.90, "lance": 0.96}, "recall_before": {}}, ()),
    "recall_lance": ({"recall": {"faiss": 0.98, "lance": 0.10}, "recall_before": {}}, ()),
    "recall_filtered_faiss": ({"recall_filtered": {"faiss": (band(0.99), band(0.9)), "lance": (band(1.0),)}}, (FOUND,)),
    "recall_filtered_lance": ({"recall_filtered": {"faiss": (band(0.99),), "lance": (band(0.9), band(0.98))}}, (FOUND,)),
    "recall_drop": ({"recall_before": {"faiss": 0.99, "lance": 0.96}}, ("faiss",)),
    "parity": ({"parity": 0.5}, ()),
    "churn": ({"churn": 0.9}, ()),
    "delete_ratio": ({"delete_ratio": 0.5}, ()),
    "checksums": ({"corrupt": ("segments/s1/index.faiss",)}, ("segments/s1/index.faiss",)),
    "unindexed": ({"unindexed": {"vector_idx": 7, "text_idx": 0}}, ("vector_idx: 7 rows",)),
}


def judged(measured: Measured, *waivers: Waiver, limits: GateLimits = LIMITS) -> dict[str, Gate]:
    return {gate.name: gate for gate in judge(measured, limits, waivers, TODAY)}


def test_a_good_generation_passes_every_gate() -> None:
    assert {gate.verdict for gate in judge(GOOD, LIMITS, (), TODAY)} == {"passed"}


@pytest.mark.parametrize("name", GATES)
def test_each_gate_fails_alone_with_value_limit_ids_and_advice(name: str) -> None:
    changes, ids = BAD[name]
    gates = judged(replace(GOOD, **changes), limits=replace(LIMITS, on_churn="fail"))
    assert [gate.name for gate in failed([*gates.values()])] == [name]
    assert gates[name].ids == ids
    assert gates[name].advice == GATES[name][1]
    assert gates[name].measured is not None


def test_all_failures_are_reported_at_once() -> None:
    everything: dict[str, Any] = {}
    for changes, _ in BAD.values():
        everything |= changes
    everything["recall"] = {"faiss": 0.1, "lance": 0.1}
    everything["recall_filtered"] = {"faiss": (band(0.1),), "lance": (band(0.1),)}
    gates = judge(replace(GOOD, **everything), replace(LIMITS, on_churn="fail"), (), TODAY)
    assert [gate.name for gate in failed(gates)] == [*GATES]


def test_what_nobody_measured_is_skipped_with_a_reason_and_never_passed() -> None:
    gates = judged(Measured(skipped={"churn": "the first generation has no previous one"}))
    assert {gate.verdict for gate in gates.values()} == {"skipped"}
    assert gates["churn"].advice == "Not measured: the first generation has no previous one."
    assert gates["recall_drop"].advice == "Not measured: no previous generation with a measured recall."
    assert gates["counts"].advice == "Not measured: no count from parts, table, index, the plan."
    assert all(gate.advice.startswith("Not measured: ") for gate in gates.values())


def test_a_missing_count_hides_no_disagreement_of_the_others() -> None:
    assert judged(replace(GOOD, index_rows=None))["counts"].verdict == "skipped"
    assert judged(replace(GOOD, index_rows=None, table_rows=99))["counts"].verdict == "failed"
    assert judged(replace(GOOD, expected_rows=None, table_rows=99))["counts"].verdict == "failed"
    assert judged(replace(GOOD, index_rows=99))["counts"].measured == "parts 100, table 100, index 99"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["self_retrieval", "replay_cosine", "parity"])
def test_a_number_that_is_none_fails(name: str, value: float) -> None:
    changes: dict[str, Any] = {name: value}
    gates = judge(replace(GOOD, **changes), LIMITS, (), TODAY)
    assert len(failed(gates)) == 1
    assert from_json(to_json(gates)) == gates


@pytest.mark.parametrize("index", ["faiss", "lance"])
def test_not_a_number_hides_behind_no_smaller_drop(index: str) -> None:
    gates = judged(replace(GOOD, recall={"faiss": 0.98, "lance": 0.96, index: math.nan}))
    assert gates["recall_drop"].verdict == gates[f"recall_{index}"].verdict == "failed"
    assert gates["recall_drop"].ids == (index,)


@pytest.mark.parametrize(
    ("bands", "verdict"),
    [
        ((band(0.95, 0.011), band(1.0)), "passed"),  # within two errors of the limit: chance may have done it
        ((band(0.95, 0.009), band(1.0)), "failed"),
        ((band(0.96, 0.02), band(0.965, 0.001)), "failed"),  # the second is lower for certain, the first by chance
        ((band(0.97),), "passed"),
        ((band(0.5, 0.1),), "failed"),
        ((band(math.nan), band(0.5)), "failed"),
        ((band(1.0), band(1.0, math.nan)), "failed"),
        ((), "skipped"),
    ],
)
def test_a_band_of_filters_fails_only_where_it_is_clearly_below(bands: tuple[FilteredRecall, ...], verdict: str) -> None:
    gate = judged(replace(GOOD, recall_filtered={"faiss": bands, "lance": GOOD.recall_filtered["lance"]}))["recall_filtered_faiss"]
    assert gate.verdict == verdict
    assert judged(GOOD)["recall_filtered_lance"].verdict == "passed"
    assert from_json(to_json([gate])) == (gate,)


def test_limits_are_inclusive_and_free_of_rounding_noise() -> None:
    edge = replace(GOOD, recall={"faiss": 0.965}, recall_before={"faiss": 0.97}, delete_ratio=0.05, parity=0.95, norm_gap=1e-3)
    assert not failed(judge(edge, LIMITS, (), TODAY))
    assert judged(replace(edge, recall={"faiss": 0.9649}))["recall_drop"].verdict == "failed"


def test_another_tower_than_the_manifest_names_fails() -> None:
    assert judged(replace(GOOD, tower="77aa00"))["fingerprint"].verdict == "failed"
    assert judged(replace(GOOD, fingerprints=()))["fingerprint"].verdict == "failed"


def test_churn_warns_unless_it_is_told_to_fail() -> None:
    churned = replace(GOOD, churn=0.9)
    assert judged(churned)["churn"].verdict == "warned"
    assert judged(churned, limits=replace(LIMITS, on_churn="fail"))["churn"].verdict == "failed"


@pytest.mark.parametrize(("until", "verdict"), [(date(2026, 11, 4), "warned"), (date(2026, 11, 3), "failed"), (date(2027, 1, 1), "warned")])
def test_a_waiver_counts_through_its_last_day(until: date, verdict: Verdict) -> None:
    waiver = Waiver(gate="parity", until=until, reason="new index since Monday")
    gate = judged(replace(GOOD, parity=0.5), waiver)["parity"]
    assert gate.verdict == verdict
    assert (gate.waiver == waiver) == (verdict == "warned")
    assert "new index since Monday" in gate.advice
    assert ("ended on 2026-11-03 and no longer counts" in gate.advice) == (verdict == "failed")


def test_a_waiver_softens_its_own_gate_only_and_turns_no_pass_into_a_warning() -> None:
    waiver = Waiver(gate="parity", until=TODAY, reason="known")
    gates = judged(replace(GOOD, self_retrieval=0.1), waiver)
    assert gates["parity"].verdict == "passed"
    assert gates["self_retrieval"].verdict == "failed"
    assert judged(replace(GOOD, parity=None), waiver)["parity"].verdict == "skipped"


def test_of_two_waivers_the_later_one_counts() -> None:
    waivers = [Waiver(gate="parity", until=day, reason="r") for day in (TODAY, date(2026, 10, 1))]
    assert judged(replace(GOOD, parity=0.5), *waivers)["parity"].verdict == "warned"


def test_an_unknown_gate_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"gate `recal_faiss`, which does not exist. Did you mean `recall_faiss`\?"):
        Waiver(gate="recal_faiss", until=TODAY, reason="typo")
    with pytest.raises(InputError, match=r"a reason to skip names gate `x`, which does not exist\.$"):
        Measured(skipped={"x": "y"})
    with pytest.raises(InputError, match="gives no reason"):
        Waiver(gate="parity", until=TODAY, reason=" ")


@pytest.mark.parametrize(
    ("name", "value"), [("recall_floor", 95), ("max_churn", -0.1), ("parity", math.nan), ("max_unindexed_rows", 0.5), ("on_churn", "stop")]
)
def test_a_limit_that_cannot_be_meant_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"`{name}`"):
        GateLimits(**{name: value})


def test_the_manifest_takes_every_verdict() -> None:
    assert Verdict == manifest.Verdict
    assert verdicts(judge(replace(GOOD, parity=0.1, churn=0.9), LIMITS, (), TODAY)) == dict.fromkeys(GATES, "passed") | {
        "parity": "failed",
        "churn": "warned",
    }


def test_at_most_ten_ids_are_shown_and_no_id_can_forge_a_line() -> None:
    ids = tuple(f"sku\n  passed  parity \x1b[2J\u202e{number}" for number in range(50))
    gates = judge(replace(GOOD, deleted_found=ids), LIMITS, (), TODAY)
    deleted = next(gate for gate in gates if gate.name == "deleted")
    assert (deleted.measured, len(deleted.ids)) == (50, MAX_IDS)
    shown = gates_text(gates)
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "such as sku\\n  passed  parity \\x1b[2J\\u202e0, " in shown
    assert len(shown.splitlines()) == 1 + len(GATES) + 2


def test_the_text_is_laid_out_for_a_person() -> None:
    waiver = Waiver(gate="parity", until=TODAY, reason="index rebuilt tonight")
    gates = judge(replace(GOOD, churn=None, parity=0.5, deleted_found=("sku-1",)), LIMITS, (waiver,), TODAY)
    assert gates_text(gates).splitlines()[:6] == [
        "Gates  15 passed   1 warned   1 FAILED   1 skipped",
        "  passed   counts                parts 100, table 100, index 100, limit exactly 100",
        "  FAILED   deleted               1, limit at most 0",
        f"           {GATES['deleted'][1]}",
        "           such as sku-1",
        "  passed   self_retrieval        1, limit at least 0.99",
    ]
    assert (
        "  skipped  churn                 not measured, limit at most 0.5\n           Not measured: no probe reported it.\n"
        in gates_text(gates)
    )
    assert (
        "  warned   parity                0.5, limit at least 0.95\n           Waived until 2026-11-04: index rebuilt tonight. "
        in gates_text(gates)
    )


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format":1}', b'{"format":1,"gates":[{"name":"x"}]}', b'{"format":2,"gates":[]}', b"\xff"])
def test_a_damaged_file_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(ManifestError, match=r"^g7/gates\.json: "):
        from_json(data, where="g7/gates.json")


def test_an_edited_verdict_is_refused() -> None:
    data = to_json(judge(GOOD, LIMITS, (), TODAY)).replace(b'"passed"', b'"fine"', 1)
    with pytest.raises(ManifestError, match="verdict 'fine'"):
        from_json(data)


SHARES = st.none() | st.floats(allow_nan=True, allow_infinity=True)
IDS = st.none() | st.lists(st.text(max_size=4), max_size=3).map(tuple)
ROWS = st.none() | st.integers(0, 3)


@given(st.data())
def test_any_measurement_gives_every_gate_once_and_survives_json(data: st.DataObject) -> None:
    kinds = {"float | None": SHARES, "tuple[str, ...] | None": IDS, "int | None": ROWS}
    values: dict[str, Any] = {
        item.name: data.draw(kinds[str(item.type)], label=item.name) for item in fields(Measured) if item.type in kinds
    }
    measured = Measured(**values)
    gates = judge(measured, LIMITS, (), TODAY)
    assert [gate.name for gate in gates] == [*GATES]
    assert from_json(to_json(gates)) == gates
    assert to_json(from_json(to_json(gates))) == to_json(gates)
    assert all(line.isprintable() for line in gates_text(gates).split("\n"))
    for gate in gates:
        assert (gate.verdict == "skipped") == (gate.measured is None) or gate.name == "counts"
