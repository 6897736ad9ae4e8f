"""The promise on which everything rests: the vectors are those of sentence-transformers on the same directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoder.inference import EncodeOptions, Encoder
from encoder.registry import TowerOptions, default_tower
from tests.towers import DECODERS, KINDS, Kind, Pooling, tiny_tower

TEXTS = [
    "Red cotton shirt, large",
    "",
    "blue leather shoes for mens | size 42 | brand new",
    "Ünïcode ☃ 東京 Größe 12345 \n tab\there",
    "wireless bluetooth charger " * 60,
    "red cotton shirt, large",
    "x",
    " ".join(f"steel drill {number} mm" for number in range(12)),
    "a text may spell <pad> and [PAD] or </s> and <|endoftext|> in its middle",
]
PROMPTS = {"query": "find: ", "document": "item | "}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    # Two threads on busy cores run a tiny tower fifteen times slower than one.
    torch.set_num_threads(1)


def reference(directory: Path, texts: Sequence[str], **settings: Any) -> Any:
    """What sentence-transformers makes of the texts, in float32 and at unit length."""
    from sentence_transformers import SentenceTransformer

    truncate = settings.pop("truncate_dim", None)
    model = SentenceTransformer(
        str(directory), device="cpu", truncate_dim=truncate, model_kwargs={"dtype": torch.float32}, local_files_only=True
    )
    return model.encode(list(texts), normalize_embeddings=True, batch_size=3, **settings)


def assert_same(found: Any, wanted: Any) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * wanted).sum(axis=1).min() >= 0.9999
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_and_pooling_gives_the_same_vectors(tmp_path: Path, kind: Kind, pooling: Pooling) -> None:
    directory = tiny_tower(tmp_path / "tower", kind=kind, pooling=pooling, prompts=PROMPTS, layers=3, max_tokens=48)
    encoder = Encoder(directory, options=EncodeOptions(token_budget=100))
    for side in ("document", "query"):
        assert_same(encoder.encode(TEXTS, kind=side), reference(directory, TEXTS, prompt_name=side))
    # The first token of a decoder sees itself alone, and may be the same in every text.
    if not (kind in DECODERS and pooling == "cls"):
        assert not np.allclose(encoder.encode(TEXTS), encoder.encode(TEXTS, kind="query"), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_that_sentence_transformers_saved_gives_the_same_vectors(tmp_path: Path, kind: Kind) -> None:
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "query: ", "passage": "passage: "}
    first = tiny_tower(tmp_path / "first", kind=kind, prompts=prompts, max_tokens=48)
    SentenceTransformer(str(first), device="cpu").save(str(tmp_path / "second"))
    encoder = Encoder(tmp_path / "second")
    assert encoder.card.max_tokens == 48
    assert_same(encoder.encode(TEXTS), reference(tmp_path / "second", TEXTS, prompt_name="passage"))
    assert_same(encoder.encode(TEXTS), Encoder(first).encode(TEXTS))


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
VARIANTS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2 without a window": ("qwen2", {"use_sliding_window": False}),
    "qwen3 with a window": ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    **{f"llama with {name}": ("llama", {"rope_scaling": rope}) for name, rope in ROPES.items()},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_configuration_may_set_gives_the_same_vectors(tmp_path: Path, name: str) -> None:
    kind, settings = VARIANTS[name]
    plain = tiny_tower(tmp_path / "plain", kind=kind, pooling="lasttoken", max_tokens=48)
    directory = tiny_tower(tmp_path / "tower", kind=kind, pooling="lasttoken", max_tokens=48)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))
    found = Encoder(directory).encode(TEXTS)
    assert_same(found, reference(directory, TEXTS))
    assert not np.allclose(found, Encoder(plain).encode(TEXTS), atol=1e-3), "the setting changes nothing"


@pytest.mark.parametrize("normalize", [True, False])
def test_truncated_vectors_are_the_truncated_vectors_at_unit_length(tmp_path: Path, normalize: bool) -> None:
    directory = tiny_tower(tmp_path / "tower", normalize=normalize)
    encoder = Encoder(directory, tower=TowerOptions(dims=8))
    assert encoder.dims == 8
    assert_same(encoder.encode(TEXTS), reference(directory, TEXTS, truncate_dim=8))


def test_settings_of_the_directory_are_kept(tmp_path: Path) -> None:
    directory = tiny_tower(tmp_path / "tower", kind="xlm-roberta", prompts={"plain": "all: "}, default_prompt="plain", shards=3)
    settings = {"max_seq_length": 20, "do_lower_case": True}
    (directory / "sentence_bert_config.json").write_text(json.dumps(settings))
    encoder = Encoder(directory)
    assert_same(encoder.encode(TEXTS), reference(directory, TEXTS))
    assert encoder.card.max_tokens == encoder.tokenize(TEXTS).lengths.max() == 20
    assert np.array_equal(*encoder.encode(["Red SHIRT", "red shirt"]))


def test_minilm_gives_the_same_vectors() -> None:
    directory = default_tower()
    texts = [*TEXTS[:5], "a very long description of a kitchen knife " * 40]
    encoder = Encoder(directory)
    full = reference(directory, texts)
    assert_same(encoder.encode(texts), full)
    short = full[:, :128] / np.linalg.norm(full[:, :128], axis=1, keepdims=True)
    tower = TowerOptions(dims=128)
    assert_same(Encoder(directory, tower=tower).encode(texts), short)
    assert (encoder.card.dims, encoder.card.max_tokens, encoder.card.pooling) == (384, 256, "mean")
