"""The packed engine against its padded twin, over every architecture, and what it does with lanes, memory and repeats."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.architectures import ARCHITECTURES
from encoder.engine import Pace, _homeward
from encoder.errors import EncoderError, TowerError
from encoder.fast_linear import FastLinear
from encoder.inference import EncodeOptions, Encoder
from encoder.registry import TowerOptions
from encoder.tokens import Tokens
from tests.encoder.test_attention import varlen_by_definition
from tests.towers import KINDS, WORDS, Kind, sentences, tiny_tower

SENTENCES = st.lists(st.sampled_from([*WORDS, "Größe", "☃", "<pad>", "[SEP]", "\x00", "x" * 30]), max_size=50).map(" ".join)
PACKING = [kind for kind in KINDS if ARCHITECTURES[kind].packs]
ROOT = Path(__file__).parent.parent.parent
ONE_LANE = EncodeOptions(threads=1, lanes=1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("towers")
    pooling: dict[Kind, Any] = {"qwen3": "lasttoken", "mistral": "lasttoken", "modernbert": "cls"}
    return {kind: tiny_tower(root / kind, kind=kind, pooling=pooling.get(kind, "mean"), max_tokens=40) for kind in KINDS}


@pytest.fixture(scope="module")
def twins(directories: dict[Kind, Path]) -> dict[Kind, tuple[Encoder, Encoder]]:
    plain = replace(ONE_LANE, engine="padded")
    return {kind: (Encoder(place, options=ONE_LANE), Encoder(place, options=plain)) for kind, place in directories.items()}


def furthest(one: Any, other: Any) -> float:
    """Return the least cosine between rows."""
    return float((one.astype(np.float64) * other).sum(axis=1).min())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(SENTENCES, min_size=1, max_size=12), budget=st.integers(1, 400))
def test_packed_and_padded_give_the_same_vectors(
    twins: dict[Kind, tuple[Encoder, Encoder]], kind: Kind, texts: list[str], budget: int
) -> None:
    fast, plain = twins[kind]
    assert fast.engine == ("packed" if ARCHITECTURES[kind].packs else "padded")
    assert plain.engine == "padded"
    usual, fast.pace = fast.pace, replace(fast.pace, token_budget=budget)
    found = fast.encode(texts)
    fast.pace = usual
    assert found.shape == (len(texts), 32)
    assert furthest(found, np.concatenate([plain.encode([text]) for text in texts])) > 0.99999


@pytest.mark.parametrize("kind", PACKING)
def test_what_cuda_would_run_gives_the_same_vectors(directories: dict[Kind, Path], kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_definition)
    texts = sentences(60)
    wanted = Encoder(directories[kind], options=ONE_LANE).encode(texts)
    encoder = Encoder(directories[kind], options=replace(ONE_LANE, token_budget=200))
    encoder._tower.varlen = True
    encoder._engine.in_flight = 2
    assert furthest(encoder.encode(texts), wanted) > 0.99999


def test_one_giant_text_among_small_ones_changes_none(tmp_path: Path) -> None:
    place = tiny_tower(tmp_path / "long", max_tokens=2000)
    texts = ["red shoes", "blue " * 5000, "", "green hat"]
    fast, plain = Encoder(place, options=ONE_LANE), Encoder(place, options=replace(ONE_LANE, engine="padded"))
    assert int(fast.tokenize(texts).lengths.max()) == 2000
    assert furthest(fast.encode(texts), plain.encode(texts)) > 0.99999


@pytest.mark.parametrize("kind", KINDS)
def test_lanes_change_no_vector_and_leave_the_threads_as_they_were(directories: dict[Kind, Path], kind: Kind) -> None:
    texts = sentences(400)
    wanted = Encoder(directories[kind], options=ONE_LANE).encode(texts)
    try:
        encoder = Encoder(directories[kind], options=EncodeOptions(threads=4, lanes=3, token_budget=128))
        assert encoder.pace == Pace(token_budget=128, lanes=3, threads=4)
        assert furthest(encoder.encode(texts), wanted) > 0.99999
        assert torch.get_num_threads() == 4
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [4], "a thread that begins later works with the threads of a lane"
    finally:
        torch.set_num_threads(1)


def test_an_error_in_one_lane_is_raised_and_ends_the_others(directories: dict[Kind, Path]) -> None:
    encoder = Encoder(directories["bert"], options=EncodeOptions(threads=2, lanes=2, token_budget=64))
    model, runs = encoder._tower.model, []

    def fail(**given_: Any) -> Any:
        runs.append(1)
        if len(runs) == 3:
            raise ValueError("the third pack")
        return model(**given_)

    encoder._tower.model = fail
    with pytest.raises(ValueError, match="the third pack"):
        encoder.encode(sentences(400))
    assert len(runs) < 10
    encoder._tower.model = model
    assert np.isfinite(encoder.encode(sentences(400))).all()
    torch.set_num_threads(1)


def test_memory_that_runs_out_on_a_cpu_halves_the_budget_too(directories: dict[Kind, Path]) -> None:
    texts = sentences(100)
    encoder = Encoder(directories["bert"], options=replace(ONE_LANE, token_budget=1024))
    wanted, model = encoder.encode(texts), encoder._tower.model

    def tight(*, input_ids: torch.Tensor, **given_: Any) -> Any:
        if input_ids.numel() > 300:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return model(input_ids=input_ids, **given_)

    encoder._tower.model = tight
    np.testing.assert_allclose(encoder.encode(texts), wanted, atol=1e-5)
    assert (encoder.token_budget, encoder.halvings) == (256, 2)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_short_last_pack_that_fails_does_not_slow_the_full_ones(directories: dict[Kind, Path], lanes: int) -> None:
    texts = sentences(300)
    encoder = Encoder(directories["bert"], options=EncodeOptions(threads=lanes, lanes=lanes, token_budget=1024))
    wanted, model = encoder.encode(texts), encoder._tower.model
    failures: list[int] = []

    def spike(*, input_ids: torch.Tensor, **given_: Any) -> Any:
        if input_ids.numel() < 900 and len(failures) < 2:
            failures.append(input_ids.numel())
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return model(input_ids=input_ids, **given_)

    encoder._tower.model = spike
    np.testing.assert_allclose(encoder.encode(texts), wanted, atol=1e-5)
    assert len(failures) == 2
    assert (encoder.token_budget, encoder.halvings) == (1024, 0)
    torch.set_num_threads(1)


def test_two_packs_share_all_threads(directories: dict[Kind, Path]) -> None:
    encoder = Encoder(directories["bert"], options=EncodeOptions(threads=8, lanes=8, token_budget=2048))
    model, seen = encoder._tower.model, []

    def look(**given_: Any) -> Any:
        seen.append(torch.get_num_threads())
        return model(**given_)

    encoder._tower.model = look
    encoder.encode_tokens(Tokens(ids=np.full(3000, 5, np.int32), offsets=np.arange(101) * 30))
    torch.set_num_threads(1)
    assert seen == [4, 4]


INTERRUPTED = """
import signal, sys, threading, time
from pathlib import Path
from encoder.inference import EncodeOptions, Encoder
encoder = Encoder(Path(sys.argv[1]), options=EncodeOptions(threads=2, lanes=2, token_budget=32))
model = encoder._tower.model
def slowly(**given):
    time.sleep(0.05)
    return model(**given)
encoder._tower.model = slowly
threading.Timer(1.0, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
start = time.monotonic()
try:
    encoder.encode([f"red shoes {number}" for number in range(5000)])
except KeyboardInterrupt:
    print(time.monotonic() - start, [thread.name for thread in threading.enumerate() if "lane" in thread.name])
"""


def test_an_interrupt_ends_the_lanes_after_the_pack_that_each_runs(directories: dict[Kind, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(directories["bert"])], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, _, left = done.stdout.partition(" ")
    assert 0.9 < float(seconds) < 6
    assert left.strip() == "[]"


def test_vectors_of_another_gpu_are_waited_for_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []

    class Event:
        def record(self, stream: Any) -> None:
            waited.append(stream)

    class OnSecondGpu:
        is_cuda, device, shape, dtype = True, "cuda:1", (2, 3), torch.float32

    home = torch.zeros(2, 3)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: home)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_, **__: home)
    assert _homeward(OnSecondGpu())["vectors"] is home
    assert waited == ["the stream of cuda:1"]


def test_a_text_that_is_there_twice_is_run_once(directories: dict[Kind, Path]) -> None:
    encoder = Encoder(directories["bert"], options=ONE_LANE)
    texts = [f"{word} shoes" for word in WORDS[:50]]
    wanted = encoder.encode(texts)
    assert encoder.texts_encoded == 50
    picks = np.random.default_rng(0).integers(0, 50, 1000)
    found = encoder.encode(pa.array(texts).take(pa.array(picks)))
    np.testing.assert_allclose(found, wanted[picks], atol=1e-5)
    assert encoder.texts_encoded == 100
    for repeated in range(50):
        assert len({row.tobytes() for row in found[picks == repeated]}) == 1


def test_windows_are_joined_in_order(directories: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(directories["bert"], options=ONE_LANE)
    texts = sentences(100, seed=3)
    wanted = encoder.encode(texts)
    monkeypatch.setattr("encoder.inference._WINDOW_TEXTS", 7)
    np.testing.assert_allclose(encoder.encode(texts), wanted, atol=1e-5)


def test_arrow_comes_out_without_a_copy(directories: dict[Kind, Path]) -> None:
    encoder = Encoder(directories["bert"], options=ONE_LANE)
    texts = pa.chunked_array([["red shoes"], ["blue hat", "red shoes"]])
    found = encoder.encode_arrow(texts)
    assert found.type == pa.list_(pa.float32(), 32)
    np.testing.assert_array_equal(np.stack(found.to_numpy(zero_copy_only=False)), encoder.encode(texts))
    assert encoder.encode_arrow([]).type == found.type


def test_linear_layers_are_quickened_and_the_twin_is_left_alone(directories: dict[Kind, Path]) -> None:
    for kind, place in directories.items():
        fast, plain = Encoder(place, options=ONE_LANE), Encoder(place, options=replace(ONE_LANE, engine="padded"))
        kinds = [{type(layer) for layer in encoder._tower.model.modules()} for encoder in (fast, plain)]
        assert FastLinear in kinds[0], kind
        assert torch.nn.Linear not in kinds[0], kind
        assert FastLinear not in kinds[1], kind


@pytest.mark.parametrize("then", ["none", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 1500])
def test_a_quick_layer_gives_the_numbers_of_the_layer(then: Any, bias: bool, tokens: int) -> None:
    layer = torch.nn.Linear(48, 80, bias=bias).requires_grad_(requires_grad=False)
    states = torch.randn(1, tokens, 48)
    wanted = layer(states)
    with torch.inference_mode():
        found = FastLinear(layer, then=then)(states)
    torch.testing.assert_close(found, torch.nn.functional.gelu(wanted) if then == "gelu" else wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PACKING)
def test_bfloat16_on_a_cpu_stays_near(directories: dict[Kind, Path], kind: Kind) -> None:
    texts = sentences(30)
    short = Encoder(directories[kind], tower=TowerOptions(dtype="bfloat16"), options=ONE_LANE)
    assert short.dtype == "bfloat16"
    assert furthest(short.encode(texts), Encoder(directories[kind], options=ONE_LANE).encode(texts)) > 0.999


def test_a_model_that_cannot_be_packed_says_so(directories: dict[Kind, Path]) -> None:
    assert [kind for kind in KINDS if kind not in PACKING] == ["mpnet"]
    with pytest.raises(TowerError, match="cannot be packed"):
        Encoder(directories["mpnet"], options=EncodeOptions(engine="packed"))
    with pytest.raises(EncoderError, match="engine is 'fast'"):
        EncodeOptions(engine="fast")  # type: ignore[arg-type]


def test_the_predicted_memory_is_that_of_a_pack(tmp_path: Path) -> None:
    place = tiny_tower(tmp_path / "wide", dims=256, max_tokens=128)
    encoder = Encoder(place, options=ONE_LANE)
    weights = (place / "model.safetensors").stat().st_size
    assert 0.9 * weights < encoder.footprint.weights < 1.2 * weights + 10_000
    ids = np.arange(128 * 128, dtype=np.int32) % encoder.vocabulary
    tokens = Tokens(ids=ids, offsets=np.arange(129) * 128)  # texts of one length hold the most scores at once
    encoder.pace = replace(encoder.pace, token_budget=1 << 20)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        encoder.encode_tokens(tokens)
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    predicted = encoder.footprint.of_pack(tokens.ids.size)
    assert 0.6 < predicted / most < 1.7, f"predicted {predicted}, took {most}"
