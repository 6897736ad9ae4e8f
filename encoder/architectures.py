"""The architectures that a tower may have, as data: what loads them, and how they may be run.

A new one is a row here, and a maker in tests/towers.py. Names, not classes: reading what a tower is loads no engine. The
facts are those of transformers 5.23; tests/encoder/test_architectures.py holds each of them against the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model type of config.json.

    `width` is its name for the dimensions of a token. `positions`: where a text begins in a learned table, or that there is
    no table. `packs`: every layer calls the registered attention function, and hands on the keyword arguments of the model,
    so texts can stand in one row; a model that does not runs padded, with its own attention, which transformers calls eager.
    `causal`: a token sees those before it. `cached`: the model keeps keys unless it is told use_cache=False.
    """

    config_class: str
    model_class: str
    arguments: Mapping[str, Any]
    width: str
    positions: Literal["learned", "after padding", "rotary"]
    padding_position: int | None
    packs: bool
    causal: bool
    cached: bool

    def first_position(self, pad_token_id: int | None) -> int:
        """Return the position id of the first token of a text.

        Where positions begin after the padding id, a token with that very id (a text may spell it) stands on it and is not
        counted: position = padding + (which token it is among those that are not padding), from one on.
        """
        padding = self.padding_id(pad_token_id)
        return 0 if padding is None else padding + 1

    def padding_id(self, pad_token_id: int | None) -> int | None:
        """Return the id after which positions begin: the model's own, or that of the configuration; None: they begin at 0."""
        if self.positions != "after padding":
            return None
        return pad_token_id if self.padding_position is None else self.padding_position


_BERT = Architecture(
    config_class="BertConfig",
    model_class="BertModel",
    arguments={"add_pooling_layer": False},
    width="hidden_size",
    positions="learned",
    padding_position=None,
    packs=True,
    causal=False,
    cached=False,
)
_ROBERTA = replace(_BERT, config_class="RobertaConfig", model_class="RobertaModel", positions="after padding")
_MODERNBERT = replace(
    _BERT,
    config_class="ModernBertConfig",
    model_class="ModernBertModel",
    arguments={},
    positions="rotary",
)
_QWEN3 = replace(_MODERNBERT, config_class="Qwen3Config", model_class="Qwen3Model", causal=True, cached=True)

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, config_class="XLMRobertaConfig", model_class="XLMRobertaModel"),
    # Its attention is its own, with a bias by distance; its padding id is 1 whatever the configuration says.
    "mpnet": replace(_ROBERTA, config_class="MPNetConfig", model_class="MPNetModel", padding_position=1, packs=False),
    "distilbert": replace(_BERT, config_class="DistilBertConfig", model_class="DistilBertModel", arguments={}, width="dim"),
    "electra": replace(_BERT, config_class="ElectraConfig", model_class="ElectraModel", arguments={}),
    "modernbert": _MODERNBERT,
    "qwen2": replace(_QWEN3, config_class="Qwen2Config", model_class="Qwen2Model"),
    "qwen3": _QWEN3,
    "llama": replace(_QWEN3, config_class="LlamaConfig", model_class="LlamaModel"),
    "mistral": replace(_QWEN3, config_class="MistralConfig", model_class="MistralModel"),
}
