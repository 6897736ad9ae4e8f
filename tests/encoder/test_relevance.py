from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import EncoderError
from encoder.examples import JUDGMENTS
from encoder.relevance import (
    Calibration,
    CalibrationOptions,
    Curve,
    calibrate,
    calibration_error,
    isotonic,
    judgments_digest,
    precision_threshold,
)

points = st.lists(st.tuples(st.integers(-5, 5), st.floats(0, 1), st.integers(1, 4)), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(points)
def test_the_isotonic_fit_is_that_of_scikit_learn(drawn: list[tuple[int, float, int]]) -> None:
    sklearn = pytest.importorskip("sklearn.isotonic")
    scores, targets, weights = (np.array(column, float) for column in zip(*drawn, strict=True))
    theirs = sklearn.IsotonicRegression(out_of_bounds="clip").fit(scores, targets, sample_weight=weights)
    at = np.linspace(-6, 6, 49)
    np.testing.assert_allclose(isotonic(scores, targets, weights)(at), theirs.predict(at), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(points, st.floats(-6, 6), st.floats(-6, 6), st.floats(0, 1))
def test_a_curve_never_falls_and_its_threshold_is_the_lowest_score_that_does(
    drawn: list[tuple[int, float, int]], one: float, other: float, wanted: float
) -> None:
    scores, targets, weights = (np.array(column, float) for column in zip(*drawn, strict=True))
    curve = isotonic(scores, targets, weights)
    low, high = curve([min(one, other), max(one, other)])
    assert 0 <= low <= high <= 1
    threshold = curve.score_at(wanted)
    if threshold is None:
        assert curve.probabilities[-1] < wanted
    else:
        assert float(curve([threshold])[0]) == pytest.approx(wanted, abs=1e-6) or threshold == curve.scores[0] or threshold in curve.scores
        assert float(curve([threshold])[0]) >= wanted - 1e-9
        if threshold > curve.scores[0]:
            assert float(curve([threshold - 1e-6])[0]) < wanted + 1e-9


def world(pairs: int = 6_000, *, seed: int = 0, thin: int = 100) -> tuple[npt.NDArray[np.float64], pa.Table, list[str]]:
    """Draw pairs whose chance of each grade rises with the score; the last `thin` are of a small vertical."""
    draws = np.random.default_rng(seed)
    scores = draws.uniform(-0.2, 1.0, pairs)
    steps = 1 / (1 + np.exp(-(8 * scores[:, None] - np.array([2.0, 4.0, 6.0]))))
    grades = (draws.random(pairs)[:, None] < steps).sum(axis=1)
    queries = draws.integers(0, pairs // 20, pairs)
    table = pa.table(
        {
            "query_id": [f"q{query}" for query in queries],
            "query": [f"query {query}" for query in queries],
            "locale": ["de" if query % 2 else "us" for query in queries],
            "product_id": [f"p{number}" for number in range(pairs)],
            "grade": pa.array(grades, pa.int8()),
        },
        schema=JUDGMENTS,
    )
    return scores, table, ["shoes"] * (pairs - thin) + ["rare"] * thin


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    scores, table, verticals = world()
    return calibrate(scores, table, tower="f" * 64, verticals=verticals)


def test_the_curves_are_near_the_truth_and_the_stated_error_is_small(calibration: Calibration) -> None:
    at = np.linspace(-0.1, 0.9, 21)
    relevant, best = calibration.probabilities(at)
    np.testing.assert_allclose(relevant, 1 / (1 + np.exp(-(8 * at - 4))), atol=0.09)
    np.testing.assert_allclose(best, 1 / (1 + np.exp(-(8 * at - 6))), atol=0.09)
    overall = calibration.stratum()
    assert overall.relevant is not None
    assert overall.relevant.ece < 0.03
    assert 0.05 < overall.relevant.brier < overall.relevant.rate * (1 - overall.relevant.rate)


def test_the_stated_error_is_that_of_unseen_queries() -> None:
    _, table, _ = world(400, seed=3)
    noise = np.random.default_rng(0).permutation(400) / 400  # scores that know nothing
    options = CalibrationOptions(min_pairs=100, min_outcomes=20)
    fit = calibrate(noise, table, tower="t", options=options).stratum().relevant
    assert fit is not None
    outcomes = (table["grade"].to_numpy() >= 2).astype(float)
    seen = float(np.mean((fit.curve(noise) - outcomes) ** 2))
    assert seen < fit.rate * (1 - fit.rate) <= fit.brier  # in sample it looks better than the mean, out of sample it is not


def test_the_best_grade_is_never_more_likely_than_relevance(calibration: Calibration) -> None:
    at = np.linspace(-1, 2, 5_000)
    for stratum in calibration.strata:
        relevant, best = calibration.probabilities(at, kind=stratum.kind, name=stratum.name)
        assert (best <= relevant).all()
        assert (np.diff(relevant) >= 0).all()
        weights = calibration.weights(at, partial=0.1, kind=stratum.kind, name=stratum.name)
        assert (np.diff(weights) >= -1e-12).all()
        assert (weights >= best).all()
        assert (weights <= relevant).all()


def test_a_stratum_of_few_pairs_says_so_and_uses_the_overall_curves(calibration: Calibration) -> None:
    named = {(item.kind, item.name): item for item in calibration.strata}
    assert set(named) == {("overall", ""), ("locale", "de"), ("locale", "us"), ("vertical", "rare"), ("vertical", "shoes")}
    assert named["vertical", "rare"].fallback.startswith("100 of 1000 pairs")
    assert calibration.stratum("vertical", "rare") == calibration.stratum("vertical", "unheard of") == calibration.strata[0]
    assert calibration.stratum("vertical", "shoes").pairs == 5_900
    assert calibration.stratum("locale", "de").name == "de"


def test_the_artifact_survives_its_json_to_the_byte(calibration: Calibration) -> None:
    data = calibration.to_json()
    assert Calibration.from_json(data) == calibration
    assert Calibration.from_json(data).to_json() == data
    assert json.loads(data)["tower"] == "f" * 64


def edited(data: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(data), **changes}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_an_edited_artifact_is_refused(calibration: Calibration) -> None:
    data = calibration.to_json()
    tree = json.loads(data)
    falling = json.loads(data)["strata"]
    falling[0]["relevant"]["curve"]["probabilities"][0] = 1.0
    bad = [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        data[:-1],
        data.replace(b",", b", ", 1),
        edited(data, format_version=2),
        edited(data, strata=[]),
        edited(data, strata=tree["strata"][1:]),
        edited(data, strata=tree["strata"] * 2),
        edited(data, strata=falling),
        edited(data, grades={"names": ["E"], "positive": 2}),
        edited(data, surprise=1),
        edited(data, tower=7),
    ]
    for damaged in bad:
        with pytest.raises(EncoderError, match=r"relevance\.json"):
            Calibration.from_json(damaged)


def test_the_digest_of_judgments_knows_their_content_and_not_their_order() -> None:
    _, table, _ = world(200)
    shuffled = table.take(np.random.default_rng(0).permutation(200))
    changed = table.set_column(4, JUDGMENTS.field("grade"), pa.array([3] * 200, pa.int8()))
    assert judgments_digest(shuffled) == judgments_digest(table) != judgments_digest(changed)


def test_calibration_error_is_zero_for_the_truth_and_the_gap_for_a_constant() -> None:
    outcomes = np.array([0.0, 1.0] * 500)
    assert calibration_error(np.full(1000, 0.5), outcomes, 15) == 0.0
    assert calibration_error(np.full(1000, 0.8), outcomes, 15) == pytest.approx(0.3)
    assert calibration_error(np.tile([0.0, 1.0], 500), outcomes, 15) == 0.0
    assert calibration_error(np.tile([1.0, 0.0], 500), outcomes, 15) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20), st.floats(0, 1))
def test_the_threshold_of_a_precision_is_the_lowest_cut_that_has_it(drawn: list[tuple[int, bool]], target: float) -> None:
    def precision(cut: int) -> float:
        kept = [relevant for score, relevant in drawn if score >= cut]
        return sum(kept) / len(kept)

    wanted = min((score for score, _ in drawn if precision(score) >= target), default=None)
    assert precision_threshold([score for score, _ in drawn], [relevant for _, relevant in drawn], target) == wanted


def test_what_cannot_be_calibrated_is_refused_with_the_reason() -> None:
    scores, table, _ = world(200)
    with pytest.raises(EncoderError, match="200 of 1000 pairs"):
        calibrate(scores, table, tower="t")
    with pytest.raises(EncoderError, match="199 scores for 200"):
        calibrate(scores[1:], table, tower="t")
    with pytest.raises(EncoderError, match="never fall"):
        Curve((0.0, 1.0), (0.5, 0.4))
    with pytest.raises(EncoderError, match="folds from 2"):
        CalibrationOptions(folds=1)
