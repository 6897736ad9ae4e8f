from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from encoder.errors import EncoderError, TowerError
from encoder.inference import EncodeOptions, Encoder
from encoder.registry import TowerOptions, export_tower, read_card
from encoder.tokens import Tokenizer, Tokens
from tests.towers import KINDS, WORDS, Kind, sentences, tiny_tower

ROOT = Path(__file__).parent.parent.parent
SENTENCES = st.lists(st.sampled_from([*WORDS, "Größe", "☃", "12.5", "x" * 30]), max_size=60).map(" ".join)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    # Two threads on busy cores run a tiny tower fifteen times slower than one.
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Encoder]:
    root = tmp_path_factory.mktemp("towers")
    pooling: dict[Kind, Any] = {"qwen3": "lasttoken", "modernbert": "cls"}
    return {kind: Encoder(tiny_tower(root / kind, kind=kind, pooling=pooling.get(kind, "mean"), max_tokens=40)) for kind in KINDS}


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return tiny_tower(tmp_path / "tower", max_tokens=64)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(SENTENCES, min_size=1, max_size=12), budget=st.integers(1, 400))
def test_a_vector_is_the_same_in_every_batch(towers: dict[Kind, Encoder], kind: Kind, texts: list[str], budget: int) -> None:
    encoder = towers[kind]
    usual, encoder.pace = encoder.pace, replace(encoder.pace, token_budget=budget)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    together = encoder.encode(texts)
    encoder.pace = usual
    assert (alone * together).sum(axis=1).min() > 0.99999
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_vectors_come_in_the_order_of_the_texts(towers: dict[Kind, Encoder]) -> None:
    texts = sentences(300)
    vectors = towers["bert"].encode(texts)
    shuffled = np.random.default_rng(1).permutation(len(texts))
    np.testing.assert_allclose(towers["bert"].encode([texts[number] for number in shuffled]), vectors[shuffled], atol=1e-5)


def test_arrow_and_python_texts_give_the_same_vectors(towers: dict[Kind, Encoder]) -> None:
    texts = sentences(20)
    wanted = towers["bert"].encode(texts)
    array = pa.array(["left out", *texts]).slice(1)
    for given_texts in (
        array,
        pa.array(texts, pa.large_string()),
        pa.chunked_array([array, array]).slice(0, 20),
        np.array(texts),
        tuple(texts),
        array.dictionary_encode(),
        pa.chunked_array([array]).cast(pa.string_view()),
        pd.Series(texts),
    ):
        np.testing.assert_array_equal(towers["bert"].encode(given_texts), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_no_texts_and_empty_texts_are_allowed(towers: dict[Kind, Encoder], kind: Kind) -> None:
    assert towers[kind].encode([]).shape == (0, 32)
    assert towers[kind].encode(pa.array([], pa.string())).dtype == np.float32
    assert np.isfinite(towers[kind].encode(["", "red shoes", ""])).all()


@pytest.mark.parametrize("texts", ["one text", ["a", None], pa.array(["a", None]), [1], [None], None, {"a", "b"}, ["a", 1]])
def test_what_is_no_text_is_refused(towers: dict[Kind, Encoder], texts: Any) -> None:
    with pytest.raises(EncoderError, match=r"string"):
        towers["bert"].encode(texts)
    with pytest.raises(EncoderError, match="kind is 'passage'"):
        towers["bert"].encode(["a"], kind="passage")  # type: ignore[arg-type]


@pytest.mark.parametrize("texts", [["\ud800"], ["fine", "\udfff half"]])
def test_half_of_a_character_is_refused_whether_alone_or_not(towers: dict[Kind, Encoder], texts: list[str]) -> None:
    with pytest.raises(EncoderError, match="half of a character"):
        towers["bert"].encode(texts)


def test_ids_beyond_the_limit_of_the_tower_are_refused(tower: Path) -> None:
    long = Tokens(ids=np.full(65, 5, np.int32), offsets=np.array([0, 65]))
    with pytest.raises(EncoderError, match="65 token ids, and the tower reads 64"):
        Encoder(tower).encode_tokens(long)
    with pytest.raises(EncoderError, match="whole numbers"):
        Tokens(ids=np.zeros(2), offsets=np.array([0, 2]))  # type: ignore[arg-type]


def test_tokens_made_ahead_give_the_same_vectors(tower: Path) -> None:
    texts = sentences(50)
    encoder = Encoder(tower)
    tokens = pickle.loads(pickle.dumps(Tokenizer(tower).tokenize(texts)))  # noqa: S301 - as Ray does
    assert len(tokens) == 50
    assert int(tokens.lengths.max()) <= 64
    lists = tokens.to_arrow()
    assert lists.type == pa.large_list(pa.int32())
    np.testing.assert_array_equal(encoder.encode_tokens(tokens), encoder.encode(texts))
    np.testing.assert_allclose(encoder.encode_tokens(Tokens.from_arrow(lists.slice(10, 5))), encoder.encode(texts)[10:15], atol=1e-5)
    once = encoder.tokenize(sorted(set(texts))).ids.size  # `encode` runs a text once, `encode_tokens` what it is given
    assert encoder.tokens_encoded == tokens.ids.size + int(tokens.lengths[10:15].sum()) + 2 * once


def test_tokens_of_another_tower_are_refused(tower: Path) -> None:
    with pytest.raises(EncoderError, match="another tower"):
        Encoder(tower).encode_tokens(Tokens(ids=np.array([5, 99_999], np.int32), offsets=np.array([0, 2])))
    for offsets in ([0, 1], [1, 2], [0, 2, 1, 2], []):
        with pytest.raises(EncoderError, match="offsets"):
            Tokens(ids=np.zeros(2, np.int32), offsets=np.array(offsets, np.int64))


def test_texts_beyond_the_limit_are_cut_with_their_special_tokens_kept(tower: Path) -> None:
    tokens = Tokenizer(tower, TowerOptions(max_tokens=10)).tokenize(["red " * 100, "red"])
    assert tokens.lengths.tolist() == [10, 3]
    assert tokens.ids[0] == tokens.ids[10]
    assert tokens.ids[9] == tokens.ids[12]


class Memory:
    """A model that has room for so many padded tokens, and fails as a GPU does beyond them."""

    def __init__(self, encoder: Encoder, *, room: int) -> None:
        self.model, self.room, self.runs, self.failures = encoder._tower.model, room, 0, 0
        encoder._tower.model = self

    def __call__(self, *, input_ids: torch.Tensor, **options: Any) -> Any:
        self.runs += 1
        if input_ids.numel() > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory")
        return self.model(input_ids=input_ids, **options)


def test_a_batch_that_does_not_fit_halves_the_budget_and_loses_nothing(tower: Path) -> None:
    texts = sentences(200)
    wanted = Encoder(tower).encode(texts)
    encoder = Encoder(tower, options=EncodeOptions(token_budget=4096))
    memory = Memory(encoder, room=300)
    np.testing.assert_allclose(encoder.encode(texts), wanted, atol=1e-5)
    assert encoder.token_budget == 4096 >> encoder.halvings
    assert 100 <= encoder.token_budget <= 300
    assert encoder.halvings == 4
    assert memory.failures == 5, "the first pack is tried twice: others may have held the memory"
    encoder.encode(texts)
    assert memory.failures == 5, "the smaller budget was forgotten"


def test_a_budget_far_above_the_texts_fails_but_a_few_times(tower: Path) -> None:
    encoder = Encoder(tower, options=EncodeOptions(token_budget=1 << 30))
    memory = Memory(encoder, room=64)
    assert encoder.encode(["red shoes", "blue shoes"] * 20).shape == (40, 32)
    assert memory.failures < 4


def test_one_text_that_does_not_fit_is_an_error(tower: Path) -> None:
    encoder = Encoder(tower, options=EncodeOptions(token_budget=512))
    Memory(encoder, room=2)
    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(sentences(10))
    assert encoder.token_budget >= 1


def test_numbers_that_are_not_finite_are_returned(tower: Path) -> None:
    weights = load_file(tower / "model.safetensors")
    ids = Tokenizer(tower).tokenize(["red"]).ids
    weights["embeddings.word_embeddings.weight"][ids[1]] = np.nan
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    vectors = Encoder(tower).encode(["red shoes", "blue shoes", "green shirt with a long cotton scarf"])
    assert np.isnan(vectors[0]).all()
    assert np.isfinite(vectors[1:]).all()


def test_another_tower_than_the_one_asked_for_is_refused(tower: Path, tmp_path: Path) -> None:
    right = read_card(tower).fingerprint
    assert Encoder(tower, fingerprint=right).fingerprint == right
    other = tiny_tower(tmp_path / "other", seed=1, max_tokens=64)
    with pytest.raises(TowerError, match=f"expected the tower {right}"):
        Encoder(other, fingerprint=right)


def test_an_exported_tower_gives_the_same_vectors(tower: Path, tmp_path: Path) -> None:
    export_tower(tower, read_card(tower, TowerOptions(dims=16)), tmp_path / "out")
    texts = sentences(10)
    np.testing.assert_array_equal(Encoder(tmp_path / "out").encode(texts), Encoder(tower, tower=TowerOptions(dims=16)).encode(texts))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_shorter_number_format_stays_near(tower: Path, dtype: Any) -> None:
    texts = sentences(20)
    vectors = Encoder(tower, tower=TowerOptions(dtype=dtype)).encode(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors * Encoder(tower).encode(texts)).sum(axis=1).min() > 0.999


def test_weights_that_do_not_fit_their_configuration_are_refused(tower: Path) -> None:
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(TowerError, match=r"lack or misfit.*layer\.2"):
        Encoder(tower)
    (tower / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(TowerError, match=r"intermediate|Save the tower again"):
        Encoder(tower)
    (tower / "config.json").write_text(json.dumps(config))
    (tower / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(TowerError, match="cannot be loaded"):
        Encoder(tower)


def test_a_tokenizer_of_another_model_is_refused(tower: Path, tmp_path: Path) -> None:
    other = tiny_tower(tmp_path / "other", kind="modernbert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tower / name).write_bytes((other / name).read_bytes())
    with pytest.raises(TowerError, match="not of one tower"):
        Encoder(tower)
    (tower / "tokenizer.json").write_text("{}")
    with pytest.raises(TowerError, match="tokenizer cannot be read"):
        Encoder(tower)


@pytest.mark.parametrize("name", ["token_budget", "threads", "lanes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "two", True, 10**12])
def test_impossible_options_are_refused(name: str, value: Any) -> None:
    with pytest.raises(EncoderError, match=f"{name} is "):
        EncodeOptions(**{name: value})


def test_an_unknown_device_is_refused(tower: Path) -> None:
    assert Encoder(tower, options=EncodeOptions(device="cpu")).device == "cpu"
    for name in ("gpu", "", "cpu:x", "meta"):
        with pytest.raises(TowerError, match=f"device is '{name}'. Choose auto, cpu"):
            Encoder(tower, options=EncodeOptions(device=name))
    with pytest.raises(TowerError, match="device is 'cuda:99', and there are"):
        Encoder(tower, options=EncodeOptions(device="cuda:99"))


def test_encoding_writes_nothing_and_needs_no_pipeline(tower: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "for name in ('ray', 'lance', 'lancedb', 'faiss', 'duckdb', 'pipelines', 'jobs', 'sentence_transformers'):\n"
        "    sys.modules[name] = None\n"
        "from encoder.inference import Encoder\n"
        "encoder = Encoder(pathlib.Path(sys.argv[1]))\n"
        "assert encoder.encode(['red shoes', 'blue']).shape == (2, encoder.dims)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tower)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("", "")
