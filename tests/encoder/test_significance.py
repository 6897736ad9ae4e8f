from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import EncoderError
from encoder.evaluation import Evaluation
from encoder.scoreboard import System, scoreboard, write_per_query
from encoder.significance import BootstrapOptions, differences, estimates, holm, minimum_detectable_effect, resampled_means

FEW = BootstrapOptions(resamples=500)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_the_step_down_of_its_definition(raw: list[float]) -> None:
    running, wanted = 0.0, dict.fromkeys(range(len(raw)), 0.0)
    for step, number in enumerate(sorted(range(len(raw)), key=raw.__getitem__)):
        running = max(running, min(1.0, raw[number] * (len(raw) - step)))
        wanted[number] = running
    assert holm(raw) == pytest.approx(list(wanted.values()))


def test_holm_of_a_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with pytest.raises(EncoderError, match="from 0 to 1"):
        holm([0.5, float("nan")])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_identical_systems_have_p_one_and_the_interval_of_zero(values: list[float]) -> None:
    column = np.array(values)[:, None]
    (found,) = differences(column, column, FEW)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_resamples_are_means_of_drawn_queries_and_columns_share_the_draws() -> None:
    draws = np.random.default_rng(0)
    values = draws.random((7, 3))
    values[2, 1] = np.nan
    found = resampled_means(values, FEW)
    generator = np.random.default_rng(0)
    for row in found:
        drawn = values[generator.integers(7, size=7)]
        np.testing.assert_allclose(row, np.nanmean(drawn, axis=0), atol=1e-12)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random((20, 2))
    whole = resampled_means(values, FEW)
    monkeypatch.setattr("encoder.significance._BLOCK", 90)
    np.testing.assert_allclose(resampled_means(values, FEW), whole, atol=1e-12)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draws, held, rejected = np.random.default_rng(3), 0, 0
    for number in range(400):
        system, baseline = draws.normal(0.5, 0.2, (80, 1)), draws.normal(0.5, 0.2, (80, 1))
        (found,) = differences(system, baseline, BootstrapOptions(resamples=400, seed=number))
        assert found.low is not None
        assert found.high is not None
        assert found.p is not None
        held += found.low <= 0 <= found.high
        rejected += found.p <= 0.05
    assert 0.91 <= held / 400 <= 0.98  # 0.95 with a standard error of 0.011, and a little less for 80 queries
    assert 0.02 <= rejected / 400 <= 0.09


def test_an_effect_of_the_detectable_size_is_found_four_times_of_five() -> None:
    draws, found = np.random.default_rng(4), 0
    effect = 2.8 * 0.3 / np.sqrt(100)
    for number in range(200):
        gaps = draws.normal(effect, 0.3, (100, 1))
        (difference,) = differences(gaps, np.zeros((100, 1)), BootstrapOptions(resamples=400, seed=number))
        assert difference.mde == pytest.approx(effect, rel=0.3)
        found += difference.p is not None and difference.p <= 0.05
    assert 0.7 <= found / 200 <= 0.9


def test_undefined_queries_are_left_out_and_empty_columns_say_nothing() -> None:
    values = np.array([[1.0, np.nan], [0.0, np.nan], [np.nan, np.nan]])
    half, nothing = estimates(values, FEW)
    assert (half.mean, half.count) == (0.5, 2)
    assert (nothing.mean, nothing.low, nothing.high, nothing.count) == (None, None, None, 0)
    assert differences(values, values, FEW)[1].p is None
    assert minimum_detectable_effect(np.array([1.0])) is None
    assert minimum_detectable_effect(np.array([0.0, 1.0, 2.0, 3.0])) == pytest.approx(2.8 * np.std([0, 1, 2, 3], ddof=1) / 2)


# --- the board ---


def system(name: str, *, shift: float = 0.0, queries: int = 90) -> System:
    draws = np.random.default_rng(7)
    values = draws.random(queries)
    table = pa.table(
        {
            "query_id": [f"q{number}" for number in range(queries)],
            "query": ["=HYPERLINK(1)"] * queries,
            "length": ["2"] * queries,
            "locale": ["us", "de", "fr"] * (queries // 3),
            "recall_E@10": pa.array(np.where(np.arange(queries) % 5 == 0, np.nan, values), from_pandas=True),
            "ndcg@10": values + shift * draws.random(queries),
            **{f"metric_{number}@100": values for number in range(12)},
        }
    )
    return System(name=name, evaluation=Evaluation(per_query=table, pooled={"auc_E|S": 0.6, "auc_S|C": None}), fingerprint=f"f-{name}")


def test_a_board_compares_with_the_baseline_and_corrects_within_families() -> None:
    board = scoreboard([system("bm25"), system("tower", shift=0.4)], baseline="bm25", bootstrap=FEW)
    overall = {(cell.system, cell.metric): cell for cell in board.cells if not cell.stratum}
    assert all(cell.difference is None for (name, _), cell in overall.items() if name == "bm25")
    better = overall["tower", "ndcg@10"]
    assert better.difference is not None
    assert better.difference.p is not None
    assert better.p_holm == pytest.approx(14 * better.difference.p)  # the smallest of fourteen
    assert overall["tower", "recall_E@10"].p_holm == 1.0
    assert overall["tower", "recall_E@10"].estimate.count == 72
    strata = [cell for cell in board.cells if cell.stratum]
    assert {(cell.stratum, cell.value) for cell in strata} == {("locale", "us"), ("locale", "de"), ("locale", "fr")}
    split = [cell for cell in strata if cell.system == "tower" and cell.metric == "ndcg@10"]
    raw = [cell.difference.p for cell in split if cell.difference is not None and cell.difference.p is not None]
    assert [cell.p_holm for cell in split] == pytest.approx(holm(raw))


def test_the_json_of_a_board_is_canonical_and_its_text_fits_the_page() -> None:
    systems = [system("bm25"), system("a tower with a very long\nname \x1b[31m" + "x" * 60, shift=0.1)]
    board = scoreboard(systems, baseline="bm25", bootstrap=FEW)
    again = scoreboard(systems, baseline="bm25", bootstrap=FEW)
    assert board.to_json() == again.to_json()
    tree = json.loads(board.to_json())
    assert tree["format_version"] == 1
    assert tree["systems"]["bm25"] == "f-bm25"
    assert tree["pooled"]["bm25"] == {"auc_E|S": 0.6, "auc_S|C": None}
    lines = board.to_text().splitlines()
    assert max(map(len, lines)) <= 140
    assert all(line.isprintable() for line in lines)
    assert sum("metric_11@100" in line for line in lines) == 2  # a column, and a comparison


def test_a_stratum_of_few_queries_is_left_out_by_name() -> None:
    board = scoreboard([system("a", queries=60), system("b", queries=60)], baseline="a", bootstrap=FEW)
    assert board.left_out == ("locale=de (20)", "locale=fr (20)", "locale=us (20)")
    assert "locale=de (20)" in board.to_text()


def test_the_export_has_a_row_for_each_system_and_query(tmp_path: Path) -> None:
    write_per_query([system("a"), system("b")], tmp_path / "per_query.parquet")
    table = pq.read_table(tmp_path / "per_query.parquet")
    assert len(table) == 180
    assert table["recall_E@10"].null_count == 36
    assert table["query"][0].as_py() == "=HYPERLINK(1)"  # data as it is: Parquet runs no formula


def test_systems_of_other_queries_are_refused() -> None:
    with pytest.raises(EncoderError, match="b has other queries than a"):
        scoreboard([system("a"), system("b", queries=60)], baseline="a", bootstrap=FEW)
    with pytest.raises(EncoderError, match="the baseline is 'c'"):
        scoreboard([system("a")], baseline="c", bootstrap=FEW)
    with pytest.raises(EncoderError, match="There is no metric mrr"):
        scoreboard([system("a")], baseline="a", bootstrap=FEW, strata_metrics=["mrr"])
