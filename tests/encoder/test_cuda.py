"""What only a GPU can show. Elsewhere these are skipped; the same code runs in test_engine.py with a stand-in for its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoder.architectures import ARCHITECTURES
from encoder.calibration import calibrate
from encoder.inference import EncodeOptions, Encoder
from encoder.registry import TowerOptions
from tests.encoder.test_engine import furthest
from tests.towers import KINDS, Kind, sentences, tiny_tower

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the GPU paths are not shown here")

ON_GPU = EncodeOptions(device="cuda")


@pytest.fixture
def _room() -> Iterator[None]:
    """Leave a process its share of the memory again."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_gpu_gives_the_vectors_of_the_cpu(tmp_path: Path, kind: Kind, dtype: Any) -> None:
    place = tiny_tower(tmp_path / "tower", kind=kind, dims=64, max_tokens=64)
    texts = [*sentences(300), "", "red " * 500]
    wanted = Encoder(place, options=EncodeOptions(device="cpu")).encode(texts)
    encoder = Encoder(place, tower=TowerOptions(dtype=dtype), options=replace(ON_GPU, token_budget=2000))
    assert encoder.engine == ("packed" if ARCHITECTURES[kind].packs and dtype != "float32" else "padded")
    assert furthest(encoder.encode(texts), wanted) > (0.9999 if dtype == "float32" else 0.999)
    assert furthest(encoder.encode(texts), np.concatenate([encoder.encode([text]) for text in texts])) > 0.999


@pytest.mark.usefixtures("_room")
def test_memory_that_runs_out_halves_the_budget_and_loses_nothing(tmp_path: Path) -> None:
    place = tiny_tower(tmp_path / "tower", dims=256, max_tokens=128)
    texts = sentences(40_000)
    wanted = Encoder(place, options=ON_GPU).encode(texts)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    encoder = Encoder(place, options=replace(ON_GPU, token_budget=1 << 20))
    assert furthest(encoder.encode(texts), wanted) > 0.999
    assert encoder.halvings > 0
    assert encoder.token_budget < 1 << 20


def test_the_predicted_memory_bounds_what_a_pack_takes(tmp_path: Path) -> None:
    encoder = Encoder(tiny_tower(tmp_path / "tower", dims=512, layers=4, max_tokens=128), options=replace(ON_GPU, token_budget=1 << 17))
    texts = sentences(20_000)
    encoder.encode(texts[:100])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encoder.encode(texts)
    took = torch.cuda.max_memory_allocated() - before
    assert 0.3 < encoder.footprint.of_pack(1 << 17) / took < 3


def test_a_gpu_is_calibrated_within_its_memory(tmp_path: Path) -> None:
    encoder = Encoder(tiny_tower(tmp_path / "tower", max_tokens=128), options=ON_GPU)
    found = calibrate(encoder)
    assert encoder.fits(found.pace.token_budget)
    assert found.pace.lanes == 1
