"""Each row of the table is held against the model that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface

from encoder.architectures import ARCHITECTURES
from encoder.layout import MODEL_TYPES, read_layout
from tests.towers import DECODERS, KINDS, WINDOW, Kind, tiny_tower

LAYERS = 3
RECORDING = "recording"


class Recording:
    """An attention function that remembers how it was called, and answers with zeros."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, _: torch.Tensor, mask: torch.Tensor | None, **options: Any
    ) -> tuple[torch.Tensor, None]:
        self.calls.append(options | {"causal": module.is_causal, "mask": mask, "heads": (query.shape[1], key.shape[1])})
        return torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3]), None


def load(directory: Path, kind: Kind, attention: str = "eager") -> Any:
    architecture = ARCHITECTURES[kind]
    model = getattr(transformers, architecture.model_class).from_pretrained(
        directory, attn_implementation=attention, **architecture.arguments
    )
    return model.eval().requires_grad_(requires_grad=False)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture
def tower(tmp_path: Path, kind: Kind) -> Path:
    return tiny_tower(tmp_path / "tower", kind=kind, layers=LAYERS, max_tokens=40)


def test_every_architecture_has_a_tiny_tower() -> None:
    assert tuple(ARCHITECTURES) == MODEL_TYPES == KINDS == get_args(Kind)


def test_the_classes_are_those_that_sentence_transformers_would_find(kind: Kind) -> None:
    config_class = transformers.CONFIG_MAPPING[kind]
    assert config_class.__name__ == ARCHITECTURES[kind].config_class
    assert transformers.MODEL_MAPPING[config_class].__name__ == ARCHITECTURES[kind].model_class


def test_what_a_model_hands_to_its_attention_is_what_the_row_says(tower: Path, kind: Kind) -> None:
    architecture, recording = ARCHITECTURES[kind], Recording()
    AttentionInterface.register(RECORDING, recording)
    AttentionMaskInterface.register(RECORDING, lambda **_: None)
    model = load(tower, kind, RECORDING if architecture.packs else "eager")
    options = {"use_cache": False} if architecture.cached else {}
    two_texts = torch.tensor([[*range(6), *range(4)]]) + architecture.first_position(model.config.pad_token_id)
    model(input_ids=torch.arange(5, 15)[None], position_ids=two_texts, spans="the boundaries", **options)
    assert len(recording.calls) == (LAYERS if architecture.packs else 0)
    for call in recording.calls:
        assert call["spans"] == "the boundaries"
        assert call["mask"] is None
        assert call["causal"] is architecture.causal
        assert call["heads"] == ((2, 1) if kind in DECODERS else (2, 2))
    windows = [call.get("sliding_window") for call in recording.calls]
    # ModernBERT looks half of its window to either side.
    wanted = {"modernbert": [None, WINDOW // 2 + 1, None], "qwen2": [None, None, WINDOW], "mistral": [WINDOW] * LAYERS}
    assert windows == (wanted.get(kind, [None] * LAYERS) if architecture.packs else [])


@pytest.mark.parametrize("kind", [kind for kind, architecture in ARCHITECTURES.items() if not architecture.packs], indirect=True)
def test_a_model_that_is_not_packed_runs_no_attention_but_its_own(tower: Path, kind: Kind) -> None:
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        load(tower, kind, "sdpa")


def test_a_model_caches_as_its_row_says(tower: Path, kind: Kind) -> None:
    architecture = ARCHITECTURES[kind]
    model = load(tower, kind)
    found = model(input_ids=torch.arange(5, 15)[None])
    assert (found.get("past_key_values") is not None) == architecture.cached
    assert getattr(model, "pooler", None) is None


@pytest.mark.parametrize("pad_token_id", [None, 3])
def test_positions_given_by_the_row_are_those_of_the_model(tower: Path, kind: Kind, pad_token_id: int | None) -> None:
    architecture = ARCHITECTURES[kind]
    model = load(tower, kind)
    if pad_token_id is not None:
        model = getattr(transformers, architecture.model_class)(model.config.__class__(**{**model.config.to_dict(), "pad_token_id": 3}))
        model = model.eval()
    padding = architecture.padding_id(model.config.pad_token_id)
    # In the middle stands the id of padding, as where a text spells it.
    ids = torch.tensor([[5, 6, 7, 9 if padding is None else padding, 8, 5]])
    positions = torch.arange(6)[None] if padding is None else torch.tensor([[1, 2, 3, 0, 4, 5]]) + padding
    assert positions[0, 0] == architecture.first_position(model.config.pad_token_id)
    wanted = model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model(input_ids=ids, position_ids=positions).last_hidden_state, wanted)
    moved = model(input_ids=ids, position_ids=positions + 1).last_hidden_state
    # Only where positions are learned does it matter where they begin.
    assert torch.allclose(moved, wanted, atol=1e-4) == (architecture.positions == "rotary")


def test_the_row_finds_width_and_length_of_the_model(tower: Path, kind: Kind) -> None:
    model, layout = load(tower, kind), read_layout(tower)
    assert layout.full_dims == model.config.hidden_size == 32
    assert layout.own_tokens == layout.most_tokens == 40
    model(input_ids=torch.full((1, layout.most_tokens), 7))
    if ARCHITECTURES[kind].positions != "rotary":
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, layout.most_tokens + 1), 7))
