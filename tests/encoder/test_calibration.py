from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoder.calibration import calibrate, measure, recall, sample
from encoder.engine import Pace
from encoder.inference import EncodeOptions, Encoder
from encoder.registry import TowerOptions
from encoder.tokens import Tokens
from tests.towers import tiny_tower


def kept(*, lanes: int = 1, token_budget: float = 1, rate: float = 1) -> bytes:
    pace = {"token_budget": token_budget, "lanes": lanes, "threads": 1}
    return json.dumps({"pace": pace, "tokens_per_s": rate, "usual_tokens_per_s": 1, "seconds": 1}).encode()


DAMAGE = [
    b"",
    b"{",
    b"[]",
    b"[" * 100_000,
    json.dumps({"pace": {"token_budget": "many"}}).encode(),
    kept(lanes=0),
    kept(lanes=10**9),
    kept(token_budget=10**18),
    kept(token_budget=float("inf")),
    kept(rate=float("inf")),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return tiny_tower(tmp_path / "tower", max_tokens=64)


class Clock:
    """A machine on which a pace is as fast as a table says: it moves the clock itself."""

    def __init__(self, patch: pytest.MonkeyPatch, encoder: Encoder, tokens_per_s: Any) -> None:
        self.now = 0.0
        self.tried: list[Pace] = []
        patch.setattr("encoder.calibration.time.perf_counter", lambda: self.now)

        def run(tokens: Tokens) -> None:
            self.tried.append(encoder.pace)
            self.now += tokens.ids.size / tokens_per_s(encoder.pace)

        patch.setattr(encoder, "encode_tokens", run)


def test_the_fastest_pace_is_found_and_set(tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tower, options=EncodeOptions(threads=4))
    assert encoder.pace == Pace(token_budget=1024, lanes=4, threads=4)
    rates = {4: 1e6, 2: 3e6, 1: 2e6}
    clock = Clock(monkeypatch, encoder, lambda pace: rates[pace.lanes] * (1.5 if pace.token_budget == 512 else 1))
    found = calibrate(encoder)
    assert found.pace == encoder.pace == Pace(token_budget=512, lanes=2, threads=4)
    assert found.tokens_per_s == pytest.approx(4.5e6)
    assert found.usual_tokens_per_s == pytest.approx(1e6)
    assert not found.kept
    assert found.seconds == pytest.approx(clock.now)


def test_a_difference_within_the_noise_changes_nothing(tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tower, options=EncodeOptions(threads=2))
    Clock(monkeypatch, encoder, lambda pace: 1e6 * (1.02 if pace.lanes == 1 else 1))
    assert calibrate(encoder).pace == Pace(token_budget=1024, lanes=2, threads=2)


def test_a_slow_tower_is_not_tried_for_long(tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tower, options=EncodeOptions(threads=2))
    clock = Clock(monkeypatch, encoder, lambda _: 100.0)
    measure(encoder, most_s=60)
    assert clock.now < 60 + 2 * 2048 / 100
    assert len(clock.tried) < 5


def test_a_real_tower_is_calibrated_in_seconds_and_stays_right(tower: Path) -> None:
    encoder = Encoder(tower, options=EncodeOptions(threads=2))
    wanted = encoder.encode(["red shoes", "blue hat"])
    found = calibrate(encoder)
    assert 0 < found.usual_tokens_per_s <= found.tokens_per_s
    assert found.seconds < 20
    np.testing.assert_allclose(encoder.encode(["red shoes", "blue hat"]), wanted, atol=1e-5)


def test_what_was_measured_is_kept_for_this_tower_and_format(tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    encoder = Encoder(tower, options=EncodeOptions(threads=2))
    clock = Clock(monkeypatch, encoder, lambda pace: 1e6 * (2 if pace.lanes == 1 else 1))
    first = calibrate(encoder, cache=cache)
    trials = len(clock.tried)
    encoder.pace = replace(encoder.pace, lanes=2)
    again = calibrate(encoder, cache=cache)
    assert len(clock.tried) == trials
    assert again == replace(first, kept=True)
    assert encoder.pace.lanes == 1
    calibrate(encoder, cache=cache, fresh=True)
    assert len(clock.tried) > trials
    assert len(list(cache.iterdir())) == 1
    for other in (
        Encoder(tower, tower=TowerOptions(dtype="bfloat16"), options=EncodeOptions(threads=2)),
        Encoder(tower, options=EncodeOptions(threads=1)),
        Encoder(tiny_tower(tmp_path / "other", seed=1, max_tokens=64), options=EncodeOptions(threads=2)),
    ):
        Clock(monkeypatch, other, lambda _: 1e6)
        assert not calibrate(other, cache=cache).kept
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_anew(tower: Path, tmp_path: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tower, options=EncodeOptions(threads=1))
    Clock(monkeypatch, encoder, lambda _: 1e6)
    calibrate(encoder, cache=tmp_path)
    (kept,) = tmp_path.glob("pace-*.json")
    kept.write_bytes(damage)
    assert not calibrate(encoder, cache=tmp_path).kept
    assert calibrate(encoder, cache=tmp_path).kept


def test_a_pace_that_memory_has_no_room_for_is_not_chosen(tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tower, options=EncodeOptions(threads=1))

    def rate(pace: Pace) -> float:
        if pace.token_budget > 512:
            encoder._engine.halvings += 1
            return 9e6
        return 1e6

    Clock(monkeypatch, encoder, rate)
    assert measure(encoder).pace.token_budget == 512


def test_a_kept_pace_that_has_no_room_now_is_left_alone(tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tower, options=EncodeOptions(threads=1))
    Clock(monkeypatch, encoder, lambda pace: 1e6 * (2 if pace.token_budget == 2048 else 1))
    assert calibrate(encoder, cache=tmp_path).pace.token_budget == 2048
    monkeypatch.setattr(encoder, "fits", lambda budget: budget < 2048)
    encoder.pace = replace(encoder.pace, token_budget=1024)
    assert not recall(encoder, cache=tmp_path)
    assert encoder.token_budget == 1024


@pytest.mark.parametrize("device", ["cpu:0", "mps"])
def test_a_device_that_is_no_nvidia_gpu_is_named_without_one(tower: Path, tmp_path: Path, device: str) -> None:
    elsewhere = type("Elsewhere", (Encoder,), {"device": device})
    encoder = elsewhere(tower, options=EncodeOptions(threads=1))
    assert not recall(encoder, cache=tmp_path)


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tower, options=EncodeOptions(threads=1))
    Clock(monkeypatch, encoder, lambda _: 1e6)
    assert not calibrate(encoder, cache=tmp_path / "absent").kept


def test_the_sample_has_the_lengths_of_product_texts() -> None:
    tokens = sample(200_000, vocabulary=1000, max_tokens=512)
    assert 190_000 < tokens.ids.size <= 200_000
    assert 40 < np.median(tokens.lengths) < 50
    assert 150 < np.quantile(tokens.lengths, 0.95) < 210
    assert tokens.ids.max() < 1000
    assert sample(1, vocabulary=10, max_tokens=8).ids.size > 0


def test_a_kept_pace_is_recalled_without_a_trial(tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tower, options=EncodeOptions(threads=2))
    assert not recall(encoder, cache=tmp_path)
    clock = Clock(monkeypatch, encoder, lambda pace: 1e6 * (2 if pace.lanes == 1 else 1))
    calibrate(encoder, cache=tmp_path)
    trials, encoder.pace = len(clock.tried), replace(encoder.pace, lanes=2)
    assert recall(encoder, cache=tmp_path)
    assert (encoder.lanes, len(clock.tried)) == (1, trials)
